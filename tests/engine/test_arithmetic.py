"""The settings engine.matmul and engine.deterministic: what they switch, and where they are refused."""

import os
from types import SimpleNamespace

import pytest
import torch

from fedspeed.engine import arithmetic
from fedspeed.engine.arithmetic import CUBLAS_WORKSPACE, check_arithmetic, set_arithmetic
from fedspeed.errors import ConfigError

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setenv(CUBLAS_WORKSPACE, "anything")  # so that monkeypatch restores it after the test
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    yield
    set_arithmetic("default", False)


@pytest.fixture
def card(monkeypatch):
    """Return a function that makes torch and DeepSpeed report a card of a compute capability."""
    import deepspeed.accelerator as deepspeed_accelerator

    def of(capability):
        found = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 1)
        monkeypatch.setattr(deepspeed_accelerator, "get_accelerator", lambda: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    return of


@pytest.mark.parametrize(
    ("matmul", "short_sums", "tf32"),
    [("default", False, False), ("fp16_accumulation", True, False), ("tf32", False, True)],
)
def test_products_are_what_was_asked_whatever_they_were(matmul, short_sums, tf32):
    MATMUL.allow_fp16_accumulation = not short_sums
    MATMUL.allow_tf32 = not tf32
    set_arithmetic(matmul, False)
    assert (MATMUL.allow_fp16_accumulation, MATMUL.allow_tf32) == (short_sums, tf32)


def test_determinism_is_torchs_and_cublas():
    set_arithmetic("default", True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    set_arithmetic("default", False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_that_varies_is_refused(monkeypatch):
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":0:0")
    check_arithmetic("default", False)
    with pytest.raises(
        ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 lets cuBLAS give other bits each time; unset it"
    ):
        check_arithmetic("default", True)
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    check_arithmetic("default", True)


@pytest.mark.parametrize("matmul", ["fp16_accumulation", "tf32"])
def test_arithmetic_of_cards_is_refused_elsewhere(matmul):
    check_arithmetic("default", True)
    with pytest.raises(
        ConfigError,
        match=f"engine.matmul={matmul} is arithmetic of NVIDIA cards, but ranks on .* compute on the cpu",
    ):
        check_arithmetic(matmul, False)


def test_a_switch_that_changes_nothing_is_refused(card, monkeypatch):
    card((8, 6))
    check_arithmetic("tf32", False)
    check_arithmetic("fp16_accumulation", False, local_rank=3)
    monkeypatch.setattr(arithmetic, "_has_fp16_accumulation", lambda: False)
    with pytest.raises(ConfigError, match="torch .* has no such switch; install 2.7 or newer"):
        check_arithmetic("fp16_accumulation", False)
    card((7, 5))
    with pytest.raises(ConfigError, match="engine.matmul=tf32: cuda:0 of .* is older than Ampere"):
        check_arithmetic("tf32", False, local_rank=1)

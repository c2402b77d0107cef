"""DeepSpeed's compiled operators: which tier needs them, the error where they cannot be built, and while they
are built.
"""

import os
import threading
from pathlib import Path

import pytest

from fedspeed.cluster.compilers import MissingRequirement
from fedspeed.engine import operators
from fedspeed.errors import FedSpeedError
from tests.limits import LIMIT_S

NVME = {
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "nvme"},
        "offload_optimizer": {"device": "cpu"},
    }
}
PLAIN = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("tier", "section", "needed"),
    [("stock", NVME, True), ("nvme", NVME, False), ("stock", PLAIN, False), ("stock", {}, False)],
)
def test_stock_execution_with_nvme_alone_needs_async_io(monkeypatch, tier, section, needed):
    monkeypatch.setattr(
        operators,
        "missing_for_async_io",
        lambda: [
            MissingRequirement("Python.h", "apt install python3-dev"),
            MissingRequirement("ninja", "pip install ninja"),
        ],
    )
    if not needed:
        operators.check_operators(tier, section)
        operators.build_operators(tier, section)
        return
    for act in (operators.check_operators, operators.build_operators):
        with pytest.raises(
            FedSpeedError,
            match=r"offload_param.device=nvme in stock execution needs DeepSpeed's async_io, .* lacks for "
            r"it\n"
            r" *Python.h: apt install python3-dev\n *ninja: pip install ninja\n *or leave engine.tier=auto",
        ):
            act(tier, section)


@pytest.fixture
def builder(monkeypatch, tmp_path):
    """Replace DeepSpeed's builder of async_io by one that writes its files, or fails with a message."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def load(self, verbose):
        if failing:
            raise RuntimeError(failing[0])
        for part in operators.PARTS:
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / f"{part}.so").touch()

    failing = []
    monkeypatch.setattr(operators, "missing_for_async_io", list)
    monkeypatch.setattr(operators, "build_folder", lambda operator: tmp_path / operator)
    monkeypatch.setattr(AsyncIOBuilder, "load", load)
    return failing


def test_a_build_is_reported_by_the_rank_that_builds(builder, tmp_path, capsys):
    (tmp_path / "pin_memory").mkdir()
    (tmp_path / "pin_memory" / "pin_memory.so").touch()
    ranks = [threading.Thread(target=operators.build_operators, args=("stock", NVME)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LIMIT_S)
    first, second = capsys.readouterr().err.splitlines()
    assert (
        first
        == f"fedspeed: building DeepSpeed's async_io in {tmp_path}: once on this machine, about six minutes "
        "of a core"
    )
    assert second.startswith("fedspeed: built in ")


def test_a_build_that_fails_is_reported(builder, tmp_path):
    builder.append(
        "Error building extension 'async_io'\n\nfatal error: x.h: No such file\nninja: build stopped\n"
    )
    with pytest.raises(
        FedSpeedError,
        match=f"async_io could not be built in {tmp_path}: .*x.h: No such file / ninja: build stopped",
    ):
        operators.build_operators("stock", NVME)


def test_ninja_is_put_on_path(monkeypatch, tmp_path):
    monkeypatch.setattr(operators, "ninja", lambda env: str(tmp_path / "ninja"))
    monkeypatch.setenv("PATH", "/usr/bin")
    for _ in range(2):
        operators._ninja_on_path()
    assert os.environ["PATH"] == f"/usr/bin{os.pathsep}{tmp_path}"
    monkeypatch.setattr(operators, "ninja", lambda env: None)
    operators._ninja_on_path()
    assert Path(os.environ["PATH"].split(os.pathsep)[-1]) == tmp_path

"""Modules that joining a world and building an engine load, and process settings that they restore."""

import gc
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import compiler

from fedspeed.engine.device_types import gpu_of_rank
from fedspeed.engine.lean_imports import TESTED
from fedspeed.engine.world import import_deepspeed, take_device
from fedspeed.session.components import preload
from tests.conftest import ROOT
from tests.engine.engines import engine
from tests.limits import LIMIT_S
from tests.processes import world_env
from tests.tiny import random_step, write_llama

UNUSED = (
    "torch._dynamo.eval_frame",
    "torch._functorch.aot_autograd",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "scipy",
    "sympy",
    "networkx",
    "distutils",
)


def loaded(base) -> list[str]:
    """Return the modules of UNUSED that this process has loaded once its engine has taken a step."""
    preload()
    with engine(base, "zero3") as built:
        built.train_step([random_step(0, 2, 2)], 0.01)
        return [name for name in UNUSED if name in sys.modules]


def compiles_late() -> str:
    """Say whether torch compiles in a process whose imports have left its compiler out."""
    preload()
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    before = "torch._dynamo.eval_frame" in sys.modules
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.ones(3).sin() + 1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter.tolist() == [0, 0, 0]
    from torch._dynamo.backends import registry

    same = registry is sys.modules["torch._dynamo.backends.registry"] is torch._dynamo.backends.registry
    return f"{before} {'torch._dynamo.eval_frame' in sys.modules} {same}"


def in_a_fresh_interpreter(code: str, **env: str) -> str:
    """Run code in a new interpreter; return the last line it prints."""
    env = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"} | env
    return subprocess.run(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
    ).stdout.splitlines()[-1]


def test_no_rank_loads_a_compiler(tmp_path):
    """Neither torch's compiler, which DeepSpeed's Muon imports, nor the one with which DeepSpeed looks for
    its operators.
    """
    base = write_llama(tmp_path / "llama")
    assert (
        in_a_fresh_interpreter(
            f"from tests.engine.test_world import loaded; print(loaded({base!r}))", **world_env([1])[0]
        )
        == "[]"
    )


@pytest.mark.slow
def test_without_it_deepspeed_loads_torchs_compiler():
    """While this holds, import_deepspeed is needed."""
    code = (
        "import sys; import deepspeed.runtime.zero.muon.muon_optimizer; "
        "print('torch._functorch.aot_autograd' in sys.modules)"
    )
    assert in_a_fresh_interpreter(code) == "True"


def test_torchs_compiler_is_imported_when_it_is_asked_for():
    code = "from tests.engine.test_world import compiles_late; print(compiles_late())"
    assert in_a_fresh_interpreter(code) == "False True True"


def test_what_deepspeed_compiles_with_is_left_as_it_was():
    before = compiler.compile
    import_deepspeed()
    assert compiler.compile is before


def test_garbage_is_collected_again_after_the_imports(monkeypatch):
    preload()
    assert gc.isenabled()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError):
        preload()
    assert gc.isenabled()


class Nvml:
    """The part of NVIDIA's management library that DeepSpeed calls."""

    @staticmethod
    def nvmlDeviceGetHandleByIndex(index):
        return index

    @staticmethod
    def nvmlDeviceGetMemoryInfo(index):
        return SimpleNamespace(free=1000 + index)


@pytest.fixture
def cuda(monkeypatch):
    """Install DeepSpeed's accelerator for CUDA, with a fake of NVIDIA's library, on a torch that sees some
    devices.
    """
    import deepspeed.accelerator as deepspeed_accelerator
    from deepspeed.accelerator import cuda_accelerator

    def sees(devices: int):
        monkeypatch.setattr(cuda_accelerator, "pynvml", Nvml)
        taken = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index=None: 7)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda index: SimpleNamespace(total_memory=507, uuid=f"id-{index}"),
        )
        accelerator = cuda_accelerator.CUDA_Accelerator()
        monkeypatch.setattr(deepspeed_accelerator, "get_accelerator", lambda: accelerator)
        return accelerator, taken

    return sees


@pytest.mark.parametrize(("devices", "local_rank", "index"), [(1, 0, 0), (1, 3, 0), (2, 1, 1), (2, 3, 1)])
def test_a_rank_and_deepspeed_take_a_device_that_they_see(cuda, monkeypatch, devices, local_rank, index):
    """DeepSpeed reads LOCAL_RANK as a device index and requires Open MPI's variable to be equal."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", str(local_rank))
    _, taken = cuda(devices)
    take_device()
    assert taken == [index] and os.environ["LOCAL_RANK"] == str(index)
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == str(index)


@pytest.mark.parametrize(
    ("names", "asks_nvidia"),
    [(None, True), ("3,5", True), ("GPU-1a,GPU-2b", False), ("MIG-1a", False), ("3,5,none", False)],
)
def test_names_of_devices_do_not_end_zero(cuda, monkeypatch, names, asks_nvidia):
    """ZeRO-1 and ZeRO-2 ask for the free memory, and DeepSpeed then parses each device name as an integer."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if names is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    accelerator, _ = cuda(2)
    if not asks_nvidia:
        with pytest.raises(ValueError, match="invalid literal for int"):
            accelerator.available_memory(0)
    take_device()
    assert (accelerator.available_memory() == 500) is not asks_nvidia
    assert not asks_nvidia or accelerator.available_memory() == 1000 + (1 if names is None else 5)


def test_a_card_is_identified_by_its_uuid(cuda, monkeypatch):
    assert gpu_of_rank(0) is None  # the environment of the tests selects the CPU
    monkeypatch.delenv("DS_ACCELERATOR")
    cuda(2)
    assert (gpu_of_rank(3).name, gpu_of_rank(3).seen, gpu_of_rank(1)) == ("GPU-id-1", 2, gpu_of_rank(3))
    cuda(1)
    assert gpu_of_rank(3).name == "GPU-id-0"


def test_stand_ins_are_for_the_pinned_versions_only():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert {name: pins[name] for name in TESTED} == TESTED
    code = (
        "import sys; from fedspeed.engine import lean_imports; lean_imports.TESTED['peft'] = '0'; "
        "lean_imports.import_models(); print('torch._dynamo.eval_frame' in sys.modules)"
    )
    assert in_a_fresh_interpreter(code) == "True"

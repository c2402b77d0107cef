"""What joining a world and building an engine load, and what they leave alone."""

import gc
import os
import subprocess
import sys

import pytest

from fedspeed.engine.world import import_deepspeed
from fedspeed.session.parts import preload
from tests.engine.engines import engine
from tests.limits import LIMIT_S
from tests.processes import world_env
from tests.tiny import write_llama

UNUSED = ("torch._inductor.compile_fx", "torch._functorch.aot_autograd", "networkx", "distutils")


def loaded(base) -> list[str]:
    """Which of UNUSED this process has loaded when its engine stands."""
    with engine(base, "zero3"):
        return [name for name in UNUSED if name in sys.modules]


def in_a_fresh_interpreter(code: str, **env: str) -> str:
    """What it prints in the end."""
    env = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"} | env
    return subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True).stdout.splitlines()[-1]


def test_no_rank_loads_a_compiler(tmp_path):
    """Neither torch's, which DeepSpeed's Muon asks for, nor the one that DeepSpeed looks for its operators with."""
    base = write_llama(tmp_path / "llama")
    assert in_a_fresh_interpreter(f"from tests.engine.test_world import loaded; print(loaded({base!r}))", **world_env([1])[0]) == "[]"


def test_without_it_deepspeed_loads_torchs_compiler():
    """As long as this holds, import_deepspeed has something to do."""
    code = "import sys; import deepspeed.runtime.zero.muon.muon_optimizer; print('torch._functorch.aot_autograd' in sys.modules)"
    assert in_a_fresh_interpreter(code) == "True"


def test_whether_torch_may_compile_is_left_as_it_was(monkeypatch):
    for value in ("0", None):
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
        if value is not None:
            monkeypatch.setenv("TORCHDYNAMO_DISABLE", value)
        import_deepspeed()
        assert os.environ.get("TORCHDYNAMO_DISABLE") == value


def test_garbage_is_collected_again_after_the_imports(monkeypatch):
    preload()
    assert gc.isenabled()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError):
        preload()
    assert gc.isenabled()

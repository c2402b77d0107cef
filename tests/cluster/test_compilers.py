"""What a machine lacks for DeepSpeed's async_io, with this machine's own compiler and with environments in
which parts of it are missing.
"""

import os
import shutil

import pytest

from fedspeed.cluster import compilers
from fedspeed.cluster.compilers import missing_for_async_io

HERE = {**os.environ, "DS_ACCELERATOR": "cpu"}
COMPILER = shutil.which("gcc") or ""
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs gcc")


def lacking(env) -> list[str]:
    return [lack.name for lack in missing_for_async_io(env)]


@needs_compiler
@pytest.mark.skipif(not os.path.exists("/usr/include/libaio.h"), reason="needs libaio-dev")
def test_a_machine_with_everything(monkeypatch):
    monkeypatch.setattr(compilers, "ninja", lambda env: "/usr/bin/ninja")
    assert lacking(HERE) == []


@needs_compiler
@pytest.mark.parametrize(
    "flags", [{"CFLAGS": "-include /nowhere/libaio.h"}, {"LDFLAGS": "-Wl,--no-such-option"}]
)
def test_libaio_is_looked_for_by_building_a_program(flags):
    assert lacking({**HERE, **flags})[-1] == "libaio with its header"
    assert "apt install libaio-dev" in str(missing_for_async_io({**HERE, **flags})[-1])


def test_every_lack_has_a_name_and_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers, "ninja", lambda env: None)
    monkeypatch.setattr(compilers, "visible_gpus", lambda env: 1)
    monkeypatch.setattr(compilers, "_cuda_toolkit", lambda env: False)
    monkeypatch.setattr(compilers.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    env = {"PATH": str(tmp_path), "CC": "mycc -m64", "CXX": "myc++"}
    assert lacking(env) == [
        "a C++ compiler (`myc++`)",
        "ninja",
        "Python.h",
        "the CUDA toolkit (nvcc)",
        "a C compiler (`mycc -m64`)",
    ]
    assert lacking({**env, "DS_ACCELERATOR": "cpu"}) == [
        "a C++ compiler (`myc++`)",
        "ninja",
        "Python.h",
        "a C compiler (`mycc -m64`)",
    ]
    assert all(lack.remedy for lack in missing_for_async_io(env))


@pytest.mark.parametrize("built", [True, False])
def test_a_deepspeed_that_was_installed_with_it_needs_nothing(monkeypatch, tmp_path, built):
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "git_version_info_installed.py").write_text(
        f"version='1'\ninstalled_ops={{'async_io': {built}, 'cpu_adam': True}}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        compilers,
        "find_spec",
        lambda name: __import__("importlib.machinery").machinery.PathFinder.find_spec(name, [str(tmp_path)]),
    )
    assert (lacking({"PATH": str(tmp_path), "CXX": "no"}) == []) == built


def test_ninja_beside_this_python_counts(monkeypatch, tmp_path):
    (tmp_path / "ninja").touch(mode=0o755)
    monkeypatch.setattr(compilers.sys, "executable", str(tmp_path / "python"))
    assert compilers.ninja({"PATH": "/nowhere"}) == str(tmp_path / "ninja")

"""What the doctor and the device count see, on machines made up for the test."""

import itertools
import subprocess
from importlib import metadata

import pytest

from fedspeed.cluster import devices, doctor
from fedspeed.cluster.compilers import MissingRequirement
from fedspeed.cluster.doctor import Check, checks, pinned, render


def test_every_failed_check_has_a_remedy_and_no_other():
    for check in checks():
        assert check.name and check.detail
        assert bool(check.remedy) == (not check.ok), check


def test_text_is_aligned():
    text = render([Check("short", True, "fine"), Check("a longer name", False, "gone", "fetch it")])
    lines = text.splitlines()
    assert lines[0].index("fine") == lines[1].index("gone")
    assert "fetch it" in lines[2]
    assert lines[-1] == "1 of 2 checks passed"


def test_pins_are_read_and_held_against_what_is_installed(monkeypatch):
    assert pinned("# c\nTorch==2.13.0\nx[extra] == 1.0 # why\nloose>=1\n") == {"Torch": "2.13.0", "x": "1.0"}
    monkeypatch.setattr(metadata, "version", lambda name: {"torch": "2.13.0+cpu", "old": "1.0"}[name])
    assert doctor._package("torch", "2.13.0").ok
    old = doctor._package("old", "2.0")
    assert (old.ok, old.remedy) == (False, "tested with 2.0: pip install old==2.0")


def test_a_package_or_tool_that_is_not_there_is_told(monkeypatch, tmp_path):
    missing = doctor._package("no-such-package-of-ours", "1.0")
    assert (missing.ok, missing.remedy) == (False, "pip install no-such-package-of-ours==1.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    tool = doctor._tool("pdsh", "pdsh", "why", "apt install pdsh")
    assert not tool.ok and "apt install pdsh; why" in tool.remedy


def test_the_python_requirement(monkeypatch):
    assert doctor._python().ok
    monkeypatch.setattr(doctor, "_OLDEST_PYTHON", (99, 0))
    assert "install Python 99.0" in doctor._python().remedy


@pytest.mark.parametrize(("user", "env", "told"), [(0, "0", True), (0, "1", False), (1000, "0", False)])
def test_what_mpirun_wants_of_root_and_beyond_the_cores_is_told(monkeypatch, user, env, told):
    monkeypatch.setattr(doctor, "_tool", lambda *_: Check("Open MPI", True, "/bin/mpirun 5.0"))
    monkeypatch.setattr(doctor, "usable_cores", lambda: 4)
    monkeypatch.setattr(doctor.os, "geteuid", lambda: user)
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, env)
    detail = doctor._mpirun().detail
    assert detail.startswith("/bin/mpirun 5.0 (more than 4 ranks here: mpirun --oversubscribe")
    assert ("as root: mpirun --allow-run-as-root" in detail) == told


@pytest.mark.parametrize("code", [0, 255])
def test_a_machine_that_takes_no_login_is_told_how_deepspeed_does_without(monkeypatch, code):
    monkeypatch.setattr(doctor, "_tool", lambda *_: Check("ssh", True, "/bin/ssh"))
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code)
    )
    check = doctor._ssh()
    assert check.ok and ("deepspeed --num_gpus N" in check.detail) == (code != 0)


@pytest.mark.parametrize(
    ("env", "gpus", "other", "chosen"),
    [
        ({}, 0, False, "cpu"),
        ({"DS_ACCELERATOR": ""}, 0, False, "cpu"),
        ({"DS_ACCELERATOR": "cuda"}, 0, False, "cuda"),
        ({}, 2, False, None),
        ({"DS_ACCELERATOR": ""}, 2, False, None),
        ({}, 0, True, None),
    ],
)
def test_deepspeed_is_told_what_it_computes_on_where_that_is_certain(
    monkeypatch, tmp_path, env, gpus, other, *, chosen
):
    monkeypatch.setattr(devices, "installed_gpus", lambda: gpus)
    monkeypatch.setattr(devices, "_OTHER_ACCELERATORS", (tmp_path if other else tmp_path / "none",))
    devices.choose_accelerator(env)
    assert env.get("DS_ACCELERATOR") == chosen


def test_what_async_io_lacks_is_told(monkeypatch):
    monkeypatch.setattr(
        doctor,
        "missing_for_async_io",
        lambda: [
            MissingRequirement("ninja", "pip install ninja"),
            MissingRequirement("Python.h", "apt install python3-dev"),
        ],
    )
    check = doctor._async_io()
    assert not check.ok and check.detail == "cannot be built without ninja and Python.h"
    assert check.remedy.startswith(
        "pip install ninja; apt install python3-dev. DeepSpeed's own NVMe offload needs it"
    )
    monkeypatch.setattr(doctor, "missing_for_async_io", list)
    assert doctor._async_io().ok


def test_little_locked_memory_is_a_note_and_no_fault(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (2**23, 2**23))
    check = doctor._locked_memory()
    assert (
        check.ok
        and "0.01 GiB (pinned offload buffers and InfiniBand need more: ulimit -l unlimited)" in check.detail
    )


def test_16_bit_arithmetic_of_the_cpu_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_lines", lambda path: ["flags : fpu avx512_bf16 avx512_fp16"])
    assert "native fp16 and bf16" in doctor._cores().detail
    monkeypatch.setattr(doctor, "_lines", lambda path: ["flags : fpu"])
    assert "emulated" in doctor._cores().detail


@pytest.mark.parametrize(
    ("chosen", "installed", "visible"),
    [
        (None, 4, 4),
        ("", 4, 0),
        ("-1", 4, 0),
        ("0", 4, 1),
        ("0,2", 4, 2),
        ("1,9,2", 4, 1),
        ("GPU-abc,GPU-def", 4, 2),
        ("0,1", 0, 0),
        ("NoDevFiles", 4, 0),
        ("none", 4, 0),
        ("void", 4, 0),
        ("0,0", 4, 0),
        ("GPU-abc,GPU-abc", 4, 0),
        ("GPU-abc,1", 4, 1),
        ("MIG-a,MIG-b,MIG-c", 1, 3),
        ("MIG-a,0", 2, 1),
        ("MIG-a", 0, 0),
    ],
)
def test_cuda_visible_devices(monkeypatch, chosen, installed, visible):
    monkeypatch.setattr(devices, "installed_gpus", lambda: installed)
    assert devices.visible_gpus({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}) == visible


def test_each_rank_is_shown_one_mig_instance_and_all_other_devices():
    assert [devices.rank_devices({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, rank) for rank in range(3)] == [
        {"CUDA_VISIBLE_DEVICES": name} for name in ("MIG-a", "MIG-b", "MIG-a")
    ]
    assert devices.rank_devices({}, 1) == {}
    for chosen in ("0,1", "GPU-a,GPU-b", "MIG-a,MIG-a"):
        assert devices.rank_devices({"CUDA_VISIBLE_DEVICES": chosen}, 1) == {}


@pytest.mark.parametrize(
    ("env", "gpus", "found"),
    [
        ({}, 1, "expandable_segments:True"),
        ({}, 0, None),
        ({"DS_ACCELERATOR": "cpu"}, 1, None),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, 1, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, 1, None),
    ],
)
def test_torchs_allocator_grows_in_place_on_gpus_unless_told_otherwise(monkeypatch, env, gpus, found):
    monkeypatch.setattr(devices, "installed_gpus", lambda: gpus)
    devices.choose_allocator(env)
    assert env.get("PYTORCH_ALLOC_CONF") == found


@pytest.mark.parametrize(
    ("env", "gpus", "ok", "told"),
    [
        ({}, 0, True, "none"),
        ({}, 2, True, "2: a, b; a rank takes one, and `python launch.py` starts up to 2"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-x"}, 2, True, "CUDA_VISIBLE_DEVICES=GPU-x shows 1; a rank takes one"),
        ({"CUDA_VISIBLE_DEVICES": "7"}, 2, False, "CUDA_VISIBLE_DEVICES=7 shows none"),
        ({"DS_ACCELERATOR": "cpu"}, 2, True, "on the CPU all the same"),
    ],
)
def test_the_doctor_tells_what_ranks_see(monkeypatch, env, gpus, ok, told):
    for module in (devices, doctor):
        monkeypatch.setattr(module, "installed_gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "_gpu_names", lambda: ["a", "b"])
    monkeypatch.setattr(doctor.os, "environ", env)
    check = doctor._gpus()
    assert check.ok is ok and told in check.detail and bool(check.remedy) is not ok


def test_cuda_visible_devices_is_read_as_torch_reads_it(monkeypatch):
    from torch.cuda import _parse_visible_devices

    entries = ("0", "1", "9", "", " 1 ", "-1", "+1", "00", "1gpu", "none", "GPU-a", "GPU-b", "MIG-a")
    for text in (
        ",".join(chosen) for length in (1, 2, 3) for chosen in itertools.product(entries, repeat=length)
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        theirs = _parse_visible_devices()
        there = itertools.takewhile(lambda device: isinstance(device, str) or device < 2, theirs)
        assert devices.chosen_gpus(text, 2) == len(list(there)), text


def test_gpus_are_counted_from_the_driver_else_from_its_tool(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_DRIVER_FOLDER", tmp_path / "gpus")
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert devices.installed_gpus() == 0
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    listing = (
        "GPU 0: NVIDIA GeForce RTX 3090 (UUID: x)\nGPU 1: NVIDIA GeForce RTX 3090 (UUID: y)\n  MIG "
        "1g.5gb Device 0: (UUID: z)\n"
    )
    monkeypatch.setattr(
        devices.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=listing)
    )
    assert devices.installed_gpus() == 2
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert devices.installed_gpus() == 3


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8)]
)
def test_a_container_quota_limits_the_cores(monkeypatch, tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(devices, "_QUOTA_FILE", tmp_path / "cpu.max")
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: range(8))
    assert devices.usable_cores() == cores

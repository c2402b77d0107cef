"""Hostile programs fail, do no harm to the host, and do not keep the next program from running."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedspeed.evaluation.languages.language import Exercise
from fedspeed.evaluation.sandbox import bubblewrap
from fedspeed.evaluation.sandbox import runner as runners
from fedspeed.evaluation.sandbox.limits import MIB, Job, Limits, Outcome
from fedspeed.evaluation.sandbox.runner import Runner, SandboxError, Unprotected, checked_sandbox
from fedspeed.evaluation.sandbox.seccomp import filter_program, is_supported
from fedspeed.evaluation.tasks.code.programs import passes, runner_for
from tests.conftest import ROOT
from tests.evaluation.sandboxes import needs_bwrap

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")

ADD = Exercise(
    name="Test/0",
    language="python",
    prompt="def add(a, b):\n",
    solution="    return a + b\n",
    test="def check(f):\n    assert f(1, 2) == 3\n",
    entry_point="add",
)
SMALL = Limits(
    wall_s=8,
    run_wall_s=2,
    cpu_s=1,
    run_cpu_s=1,
    memory=192 * MIB,
    processes=24,
    disk=16 * MIB,
    files=500,
    output=100_000,
)
# Each would pass, were it not for what it does at the margin; where a program tries to get at something, it
# ends well only if it succeeds. CANARY is a file of the host, PORT a port that is listened on, MARK a number.
HOSTILE = {
    "fork bomb": "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "endless loop": "while True:\n    pass",
    "sleeper": "time.sleep(MARK)",
    "signals ignored": "for number in set(signal.valid_signals()) - {9, 19}:\n"
    "    signal.signal(number, signal.SIG_IGN)\nwhile True:\n    pass",
    "memory hog": "hog = []\nwhile True:\n    hog.append(bytearray(10**7))",
    "shared memory hog": "import mmap\nhog = mmap.mmap(-1, 2**31)\nfor at in range(0, 2**31, 4096):\n"
    "    hog[at] = 1",
    "memory of many": "for _ in range(9):\n    if not os.fork():\n        hog = b'x' * (100 * 2**20)\n"
    "        time.sleep(9)\ntime.sleep(9)",
    "anonymous files": "os.write(os.memfd_create('x'), b'x')",
    "large file": "file = open('/tmp/large', 'wb')\nwhile True:\n    file.write(bytes(10**6))",
    "many files": "for number in range(10**7):\n    open(f'/tmp/{number}', 'w').close()",
    "file in the system": "open('/usr/new', 'w')",
    "file in the root": "open('/new', 'w')",
    "file in shared memory": "open('/dev/shm/new', 'w')",
    "network": "socket.create_connection(('127.0.0.1', PORT)).send(b'x')",
    "abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0fedspeed-test-PORT')",
    "socket of the hypervisor": "socket.socket(40, socket.SOCK_STREAM)",
    "exit before the tests": "os._exit(0)",
    "polite exit before the tests": "sys.exit(0)",
    "fake success": "print('passed', 'works', 'OK', 'a' * 32)\nos._exit(0)",
    "output flood": "while True:\n    print('x' * 1000)",
    "link to the host": "os.symlink('CANARY', '/tmp/link')\nopen('/tmp/link', 'a').write('changed')",
    "link to the program of another": "os.symlink(os.path.join('/proc', '1', 'root', 'CANARY'), 'link')\n"
    "open('link').read()",
    "users of the host": "open('/etc/passwd').read()",
    "home": "assert os.listdir('/root') or os.listdir('/home')",
    "environment of the host": "assert any(b'SECRET_OF_THE_HOST' in\n"
    "    open(f'/proc/{pid}/environ', 'rb').read()"
    " for pid in os.listdir('/proc') if pid.isdigit())",
    "kill all": "os.kill(-1, signal.SIGKILL)\ntime.sleep(9)",
    "kill the parent": "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(9)",
    "daemon": "if not os.fork():\n    os.setsid()\n    if not os.fork():\n"
    "        os.execlp('sleep', 'sleep', 'MARK')\n    os._exit(0)\ntime.sleep(0.1)\nos._exit(0)",
    "child that holds the output": "if not os.fork():\n    time.sleep(MARK)\nos._exit(0)",
    "user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "trace": "import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
}
# The limit that the supervisor has to see exceeded, where no other one ends the program.
SEEN = {
    "many files": "files",
    "memory of many": "memory",
    "shared memory hog": "memory",
    "output flood": "output",
}
IMPORTS = "import os, signal, socket, sys, time\n"


class Small(Runner):
    """Runs jobs of any limits under small ones."""

    def __init__(self, runner):
        self.runner = runner
        self.is_sandbox = runner.is_sandbox
        self.outcomes = []

    def run(self, job):
        self.outcomes.append(self.runner.run(replace(job, limits=SMALL)))
        return self.outcomes[-1]


@pytest.fixture(scope="module")
def sandbox():
    """A sandbox, checked once."""
    return checked_sandbox()


def is_running(mark):
    """Say whether a process of the host carries a mark in its command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark.encode() in words:
                return True
    return False


def wait_until(condition, seconds=5.0):
    """Wait for a condition, and return whether it came true."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@needs_bwrap
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_fails_and_the_next_one_runs(name, sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_HOST", "1")
    canary = tmp_path / "canary"
    canary.write_text("unchanged")
    mark = f"97.{os.getpid()}{list(HOSTILE).index(name)}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        port = str(server.getsockname()[1])
        server.setblocking(False)
        abstract.bind(f"\0fedspeed-test-{port}")
        abstract.listen()
        attack = HOSTILE[name].replace("CANARY", str(canary)).replace("PORT", port).replace("MARK", mark)
        small = Small(sandbox)
        began = time.monotonic()
        assert not passes(small, ADD, f"{ADD.solution}{IMPORTS}{attack}\n")
        assert time.monotonic() - began < SMALL.wall_s + 4
        with pytest.raises(BlockingIOError):
            server.accept()
    outcome = small.outcomes[0]
    assert outcome.killed_for == SEEN.get(name, outcome.killed_for)
    assert len(outcome.output) <= SMALL.output
    assert outcome.peak_memory < SMALL.memory + 256 * MIB
    assert canary.read_text() == "unchanged"
    assert wait_until(lambda: not is_running(mark))
    assert passes(sandbox, ADD, ADD.solution)


@needs_bwrap
def test_a_program_sees_no_more_than_it_needs(sandbox):
    code = (
        "import os\nprint(sorted(os.environ), os.getuid(), os.listdir('/tmp'), os.listdir('/etc'))\n"
        "print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit())[:2], len(os.listdir('/sys'))"
        " if os.path.exists('/sys') else 'no /sys')\n"
        "print([line.split()[1] for line in open('/proc/self/status')"
        " if line.startswith(('CapEff', 'NoNew'))])"
    )
    text = sandbox.run(Job(files={"main.py": code}, run=("/usr/bin/python3", "-I", "main.py"))).text
    seen, processes, rights = text.splitlines()
    assert "SECRET" not in seen and "['HOME', 'LANG', 'PATH'" in seen and " 65534 ['main.py']" in seen
    assert "passwd" not in seen and "shadow" not in seen
    assert processes == "[1, 2] no /sys"
    assert rights == "['0000000000000000', '1']"


@needs_bwrap
def test_reserved_address_space_is_no_used_memory(sandbox):
    """Node, Go and Java reserve more than they use: what cannot be written is not limited."""
    code = (
        "import mmap\nhold = mmap.mmap(-1, 2**35, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)\nprint('works')"
    )
    job = Job(files={"main.py": code}, run=("/usr/bin/python3", "-I", "main.py"), limits=SMALL)
    assert sandbox.run(job).text == "works\n"


@needs_bwrap
def test_the_supervisor_kills_what_takes_too_long(sandbox):
    mark = f"95.{os.getpid()}"
    began = time.monotonic()
    outcome = sandbox.run(
        Job(files={}, run=("sleep", mark), limits=replace(SMALL, wall_s=0.5, run_wall_s=60))
    )
    assert outcome.killed_for == "time" and time.monotonic() - began < 10
    assert wait_until(lambda: not is_running(mark))


@needs_bwrap
def test_a_sandbox_ends_with_the_process_that_started_it():
    mark = f"96.{os.getpid()}"
    code = (
        "from fedspeed.evaluation.sandbox.runner import Bubblewrap\n"
        "from fedspeed.evaluation.sandbox.limits import Job\n"
        f"Bubblewrap().run(Job(files={{}}, run=('sleep', '{mark}')))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        assert wait_until(lambda: is_running(mark), 30)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert wait_until(lambda: not is_running(mark))


@needs_bwrap
@needs_root
@pytest.mark.parametrize("name", ["fork bomb", "many files", "shared memory hog", "memory of many"])
def test_limits_hold_for_an_ordinary_user_too(name):
    """The other tests run as whoever runs them, in a container as root."""
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(54321)
            os.setuid(54321)
            sandbox = checked_sandbox()
            hostile = passes(Small(sandbox), ADD, f"{ADD.solution}{IMPORTS}{HOSTILE[name]}\n")
            os._exit(2 * hostile + (not passes(sandbox, ADD, ADD.solution)))
        finally:
            os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_bwrap
def test_a_limit_that_does_not_hold_is_found(monkeypatch):
    """As where the kernel counts nobody's processes, or not those of root."""
    limited = bubblewrap.limited

    def unlimited(job):
        return limited(replace(job, limits=replace(job.limits, processes=1000)))

    monkeypatch.setattr(bubblewrap, "limited", unlimited)
    _refused_for_processes()


@needs_bwrap
def test_a_limit_that_only_the_supervisor_saw_exceeded_does_not_hold(monkeypatch):
    """It ends the trial before all of its output is written."""
    ended = Outcome("processes", -9, b"started\nprocess\nprocess\nprocess\n", 1, 13)
    monkeypatch.setattr(runners.Bubblewrap, "run", lambda self, job: ended)
    _refused_for_processes()


def _refused_for_processes():
    with pytest.raises(
        SandboxError, match="limit of 8 processes does not hold here: [0-9]+ were started.*--unsafe"
    ):
        checked_sandbox()


def test_without_a_sandbox_programs_are_refused_unless_that_is_allowed(monkeypatch, capsys):
    monkeypatch.setattr(runners, "_bwrap", lambda: (_ for _ in ()).throw(SandboxError("none here")))
    with pytest.raises(SandboxError, match="none here"):
        runner_for(["python"], unsafe=False)
    runner = runner_for(["python"], unsafe=True)
    assert isinstance(runner, Unprotected) and not runner.is_sandbox
    assert "programs run WITHOUT a sandbox" in capsys.readouterr().err
    small = Small(runner)
    assert passes(small, ADD, ADD.solution)
    for name in ("exit before the tests", "endless loop", "memory hog", "output flood", "sleeper"):
        attack = HOSTILE[name].replace("MARK", "97")
        assert not passes(small, ADD, f"{ADD.solution}{IMPORTS}{attack}\n"), name


def test_missing_and_old_bubblewrap_are_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(runners.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SandboxError, match="bwrap is not installed; install bubblewrap 0.8.*--unsafe"):
        checked_sandbox()
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho bubblewrap 0.6.1\n")
    old.chmod(0o755)
    with pytest.raises(SandboxError, match="bubblewrap 0.6.1; install bubblewrap 0.8"):
        checked_sandbox()


def test_filter_knows_both_architectures():
    """Every instruction is eight bytes long, and jumps stay inside of the program."""
    assert is_supported("x86_64") and is_supported("aarch64") and not is_supported("riscv64")
    programs = [filter_program(machine) for machine in ("x86_64", "aarch64")]
    assert programs[0] != programs[1]
    for program in programs:
        lines = [program[at : at + 8] for at in range(0, len(program), 8)]
        assert len(program) % 8 == 0 and lines[-1] == b"\x06\0\0\0" + (0x7FFF0000).to_bytes(4, "little")
        assert all(at + 1 + max(line[2:4]) < len(lines) for at, line in enumerate(lines[:-1]))

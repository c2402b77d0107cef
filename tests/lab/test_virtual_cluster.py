"""The virtual cluster itself, and real DeepSpeed on it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.cluster import VirtualCluster, why_not
from tests.lab.errors import LabError
from tests.lab.folder import find_labs
from tests.lab.processes import children
from tests.limits import LIMIT_S

ROOT = Path(__file__).parents[2]
GREET = ROOT / "tests" / "lab" / "greet.py"
KINDS = ("net", "pid", "mnt")

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"virtual cluster: {why_not()}")


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab") / "three"
    path.write_text("# the slots differ on purpose\nalpha slots=2\nbeta slots=1\ngamma slots=1\n")
    return path


@pytest.fixture(scope="module")
def lab(hostfile):
    with VirtualCluster(hostfile, rate="200mbit", env={"LAB_MARK": "seen-everywhere"}) as cluster:
        yield cluster


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def family(pid: int) -> list[int]:
    """`pid` and all its descendants."""
    return [pid, *(member for child in children(pid) for member in family(child))]


def namespaces(pids: list[int]) -> set[str]:
    """The namespaces of `pids` that are not this process's own, such as "net:[4026532001]"."""
    return {
        link
        for pid in pids
        for kind in KINDS
        if (link := namespace(pid, kind)) not in (None, namespace(os.getpid(), kind))
    }


def namespace(pid: int, kind: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except (
        FileNotFoundError,
        ProcessLookupError,
        PermissionError,
    ):  # it has ended, or is the machine's own process 1
        return None


def inhabitants(spaces: set[str]) -> list[int]:
    """All processes of the machine that are in one of `spaces`."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if any(namespace(pid, kind) in spaces for kind in KINDS)]


def assert_nothing_left(folder: Path, spaces: set[str]) -> None:
    assert inhabitants(spaces) == []
    assert not folder.exists()
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()


def wait_until(condition, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def another_owner(hostfile: Path):
    """Another process that owns a lab with a command running on it; yields it and the lab's folder, and kills
    it.
    """
    command = "trap 'echo asked; exit 9' TERM; dirname $TMPDIR; while :; do sleep 0.1; done"
    owner = subprocess.Popen(
        [sys.executable, "-m", "tests.lab", "run", str(hostfile), "--", "sh", "-c", command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        try:
            yield owner, Path(owner.stdout.readline().strip())
        finally:
            owner.kill()


# --- what a host is


def test_hosts_know_themselves_and_each_other_by_name(lab):
    for host in lab.hosts:
        assert said(lab.run(["hostname"], timeout=20, host=host.name)) == host.name
        assert said(lab.run(["hostname", "-I"], timeout=20, host=host.name)) == host.address
        assert said(lab.run(["ssh", host.name, "hostname"], timeout=20)) == host.name


def test_hosts_share_the_disk_but_not_their_temporary_files(lab, tmp_path):
    lab.run(["sh", "-c", f"echo shared > {tmp_path}/note; touch $TMPDIR/mine /dev/shm/mine"], timeout=20)
    assert said(lab.run(["cat", f"{tmp_path}/note"], timeout=20, host="beta")) == "shared"
    # The same through a login, which is how the launchers come.
    assert said(lab.run(["ssh", "beta", "ls $TMPDIR /dev/shm | grep -c mine || true"], timeout=20)) == "0"
    assert said(lab.run(["ssh", "alpha", "ls $TMPDIR /dev/shm | grep -c mine"], timeout=20)) == "2"


def test_the_machine_sees_nothing_of_the_lab(lab):
    assert not {"switch", "port1"} & set(
        re.findall(
            r"^\d+: ([^:@]+)",
            said(subprocess.run(["ip", "-o", "link"], check=False, capture_output=True, text=True)),
            re.MULTILINE,
        )
    )
    assert str(lab.folder) not in Path("/proc/self/mountinfo").read_text()
    assert "alpha" not in Path("/etc/hosts").read_text()
    # Nor does a host see the machine: one device, and no processes but its own.
    assert said(lab.run(["ls", "/sys/class/net"], timeout=20, host="gamma")).split() == ["eth0", "lo"]
    assert str(os.getpid()) not in said(lab.run(["ls", "/proc"], timeout=20, host="gamma")).split()


def test_a_login_neither_reads_nor_makes_the_users_ssh_folder(hostfile, tmp_path):
    broken = tmp_path / "home" / ".ssh"
    broken.mkdir(parents=True)
    (broken / "config").write_text("this is no configuration\n")
    with VirtualCluster(hostfile) as cluster:
        assert (
            said(cluster.run(["ssh", "beta", "hostname"], timeout=20, env={"HOME": str(broken.parent)}))
            == "beta"
        )
    assert [path.name for path in broken.iterdir()] == ["config"]


# --- running commands


def test_run_passes_status_output_input_variables_and_directory(lab, tmp_path):
    command = ["sh", "-c", "cat; echo $WORD; pwd; echo bad >&2; exit 3"]
    done = lab.run(command, timeout=20, env={"WORD": "hello"}, cwd=tmp_path, stdin="in\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, f"in\nhello\n{tmp_path}\n", "bad\n")
    assert lab.run(["sh", "-c", "kill -KILL $$"], timeout=20).returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_ended_with_its_children(lab):
    with pytest.raises(subprocess.TimeoutExpired) as late:
        lab.run(
            ["sh", "-c", "echo started; sleep 600 & trap '' TERM; while :; do sleep 0.1; done"], timeout=0.5
        )
    assert late.value.output == "started\n"
    # Process 1 of every host is a `sleep` too.
    wait_until(
        lambda: said(lab.run(["sh", "-c", "grep -lx sleep /proc/[0-9]*/comm"], timeout=20)) == "/proc/1/comm"
    )


def test_a_signal_reaches_the_command(lab):
    process = lab.spawn(
        ["sh", "-c", "trap 'echo asked; exit 5' TERM; echo up; while :; do sleep 0.1; done"],
        host="beta",
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.communicate(timeout=20) == ("asked\n", None)
    assert process.returncode == 5


def test_unknown_hosts_are_named(lab):
    with pytest.raises(LabError, match="delta.*alpha, beta, gamma"):
        lab.run(["true"], timeout=20, host="delta")


# --- real DeepSpeed


# That pdsh does is shown by test_rounds, too.
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_deepspeed_starts_a_rank_in_every_slot(lab, hostfile, launcher):
    done = lab.run(
        ["deepspeed", "--hostfile", str(hostfile), "--launcher", launcher, str(GREET)], timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = re.findall(r"greet rank=(\d) size=4 host=(\w+) sum=10 mark=seen-everywhere", done.stdout)
    assert sorted(ranks) == [("0", "alpha"), ("1", "alpha"), ("2", "beta"), ("3", "gamma")], done.stdout


# --- the network


SERVE = """
import socket
server = socket.create_server(("", 7000))
print("listening", flush=True)
peer, _ = server.accept()
"""


def serving(lab, host: str, then: str) -> subprocess.Popen:
    """Start a server on `host` that runs `then` once it has a `peer`."""
    process = lab.spawn([sys.executable, "-c", SERVE + then], host=host, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening\n"
    return process


def test_a_transfer_takes_as_long_as_the_link_is_slow(lab):
    megabytes = 20
    server = serving(lab, "beta", "while peer.recv(1 << 20): pass\npeer.send(b'x')")
    client = f"""
import socket, time
sock = socket.create_connection(("beta", 7000))
start = time.monotonic()
sock.sendall(bytes({megabytes} * 10**6))
sock.shutdown(socket.SHUT_WR)
sock.recv(1)
print(time.monotonic() - start)
"""
    with server:
        seconds = float(said(lab.run([sys.executable, "-c", client], timeout=LIMIT_S)))
    # Queues and the first burst take something off; a link that is not shaped needs less than a tenth of
    # this.
    assert seconds > 0.8 * megabytes * 8 / 200


@pytest.mark.slow
def test_a_host_without_power_is_silent_and_can_be_booted_again(hostfile):
    client = """
import socket
sock = socket.create_connection(("beta", 7000))
print("connected", flush=True)
sock.settimeout(2)
try:
    print("closed" if sock.recv(1) == b"" else "data")
except TimeoutError:
    print("silence")
"""
    with VirtualCluster(hostfile) as cluster:
        server = serving(cluster, "beta", "peer.recv(1)")
        with server, cluster.spawn([sys.executable, "-c", client], stdout=subprocess.PIPE, text=True) as peer:
            assert peer.stdout.readline() == "connected\n"
            cluster.kill_host("beta")
            assert peer.communicate(timeout=20)[0] == "silence\n"
        assert server.returncode == -signal.SIGKILL
        with pytest.raises(LabError, match="beta is down"):
            cluster.run(["true"], timeout=20, host="beta")
        cluster.boot_host("beta")
        assert said(cluster.run(["ssh", "beta", "hostname"], timeout=20)) == "beta"


# --- the end


def test_nothing_is_left_of_a_lab_that_ended_in_any_way(hostfile):
    others = namespaces(family(os.getpid()))
    with pytest.raises(KeyboardInterrupt), VirtualCluster(hostfile) as cluster:
        cluster.spawn(["sleep", "600"], host="gamma")
        cluster.run(
            ["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &"], timeout=20
        )  # one that has left its session
        spaces = namespaces(family(os.getpid())) - others
        folder = cluster.folder
        assert len(inhabitants(spaces)) > len(cluster.hosts)
        raise KeyboardInterrupt
    assert_nothing_left(folder, spaces)


def test_a_lab_that_cannot_start_leaves_nothing(hostfile, monkeypatch):
    def mine() -> list[Path]:
        return [lab.folder for lab in find_labs() if lab.state and lab.state.owner[0] == os.getpid()]

    before = mine()
    monkeypatch.setattr("tests.lab.machine.SSHD", "/bin/false")
    with pytest.raises(LabError, match="sshd does not start"), VirtualCluster(hostfile):
        pass
    assert mine() == before


def test_nothing_is_left_after_kill_9_of_the_owner(hostfile):
    with another_owner(hostfile) as (owner, folder):
        spaces = namespaces(family(owner.pid))
        assert inhabitants(spaces)
        owner.kill()
    wait_until(lambda: not folder.exists())
    assert_nothing_left(folder, spaces)


def test_down_removes_what_is_left_when_the_supervisor_was_killed_too(hostfile):
    with another_owner(hostfile) as (owner, folder):
        state = json.loads((folder / "lab.json").read_text())
        spaces = namespaces(family(owner.pid))
        os.kill(state["supervisor"][0], signal.SIGKILL)
        owner.kill()
    wait_until(lambda: [lab.running for lab in find_labs() if lab.folder == folder] == [False])
    subprocess.run([sys.executable, "-m", "tests.lab", "down"], cwd=ROOT, check=True)
    assert_nothing_left(folder, spaces)


@pytest.mark.slow
def test_sigterm_ends_the_command_first_and_then_the_lab(hostfile):
    with another_owner(hostfile) as (owner, folder):
        spaces = namespaces(family(owner.pid))
        owner.terminate()
        assert owner.communicate(timeout=20)[0] == "asked\n"
    assert owner.returncode == 9
    assert_nothing_left(folder, spaces)


def test_two_labs_coexist_and_down_ends_the_named_one_only(lab, hostfile):
    with another_owner(hostfile) as (owner, folder):
        spaces = namespaces(family(owner.pid))
        assert {lab.folder, folder} <= {other.folder for other in find_labs() if other.running}
        subprocess.run(
            [sys.executable, "-m", "tests.lab", "down", folder.name.removeprefix("fedspeed-lab-")],
            cwd=ROOT,
            check=True,
        )
        owner.wait(20)
    assert_nothing_left(folder, spaces)
    assert said(lab.run(["ssh", "gamma", "hostname"], timeout=20)) == "gamma"

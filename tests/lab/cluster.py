"""A cluster on one machine: every host of a hostfile with a separate network, host name, processes, $TMPDIR
and sshd.

    with VirtualCluster("hostfiles/hetero10", rate="1gbit") as lab:
        lab.run(["deepspeed", "--hostfile", "hostfiles/hetero10", "launch.py"], timeout=300)

A host is a set of Linux namespaces (network, PID, mount, UTS, IPC) nested in those of the lab. The machine's
links, routes, mounts, /etc and ~/.ssh are neither changed nor used. All hosts share the disk, as on most
clusters, except $TMPDIR, /dev/shm and /run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.lab.errors import LabError
from tests.lab.folder import make_folder
from tests.lab.hosts import LabHost, etc_hosts, read_hosts
from tests.lab.machine import Machine
from tests.lab.network import make_switch
from tests.lab.processes import EnteredProcess
from tests.lab.ssh import SSHD, write_ssh
from tests.lab.supervisor import Supervisor

_TOOLS = ("unshare", "nsenter", "setsid", "mount", "hostname", "ip", "tc", "ssh", "ssh-keygen", SSHD)
_LOGIN_TIMEOUT_S = 120.0
_GRACE_S = 5.0


def why_not() -> str | None:
    """Return the reason why this machine cannot run a virtual cluster; None if it can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}; docs/virtual-cluster.md lists the packages"
    attempt = subprocess.run(
        ["unshare", "--net", "--pid", "--uts", "--ipc", "--mount", "--fork", "--mount-proc", "true"],
        check=False,
        capture_output=True,
        text=True,
    )
    if attempt.returncode != 0:
        return (
            f"this machine refuses new namespaces ({attempt.stderr.strip()}); a container must be privileged"
        )
    return None


class VirtualCluster:
    """The hosts of a hostfile, which run during the `with` block.

    Args:
        hostfile: a DeepSpeed hostfile, or a tuple of LabHost. The first host is the head, where commands run
            by default.
        rate: speed of every host's link, such as "200mbit"; None: `link_gbps` of the hostfile, or unlimited
            without it.
        env: additional variables of every rank. They reach the other hosts as on a real cluster, through
            DeepSpeed's environment file, and are also set for the commands of `run` and `spawn`.

    Attributes:
        hosts: tuple of LabHost, in the hostfile's order.
        folder: the lab's temporary folder, which is removed at the end.
    """

    def __init__(
        self,
        hostfile: Path | str | tuple[LabHost, ...],
        rate: str | None = None,
        env: dict[str, str] | None = None,
    ):
        self.hosts = hostfile if isinstance(hostfile, tuple) else read_hosts(hostfile, rate)
        self.folder: Path | None = None
        self._rank_env = {**_rank_env(), **(env or {})}
        self._supervisor: Supervisor | None = None
        self._machines: dict[str, Machine] = {}

    def __enter__(self) -> Self:
        if reason := why_not():
            raise LabError(f"no virtual cluster on this machine: {reason}")
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def run(
        self,
        command: list[str],
        timeout: float,
        host: str | None = None,
        env: dict[str, str] | None = None,
        cwd: Path | str | None = None,
        *,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess:
        """Run `command` on `host` (default: the head) and return its exit status and its output as text.

        Args:
            timeout: seconds. Then the command gets SIGTERM, and soon after it SIGKILL, together with all
                processes it started on this host. Those on other hosts may live until the lab ends.
            env: variables for this command only.
            cwd: default: the current directory.
            stdin: text for its standard input.

        Raises:
            subprocess.TimeoutExpired: with the output so far.
            LabError: there is no such host, or it is down.
        """
        process = self.spawn(
            command,
            host,
            env,
            cwd,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                out, err = process.communicate(stdin, timeout=timeout)
            except subprocess.TimeoutExpired:
                out, err = _stop(process)
                raise subprocess.TimeoutExpired(command, timeout, out, err) from None
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def spawn(
        self,
        command: list[str],
        host: str | None = None,
        env: dict[str, str] | None = None,
        cwd: Path | str | None = None,
        **popen,
    ) -> EnteredProcess:
        """Start `command` on `host` and return at once. The result has the interface of subprocess.Popen,
        whose arguments `popen` takes.

        Raises:
            LabError: there is no such host, or it is down.
        """
        machine = self._machine(self.hosts[0].name if host is None else host)
        popen.setdefault("stdin", subprocess.DEVNULL)
        variables = {
            **os.environ,
            **self._rank_env,
            **self._login_env(),
            "DS_ENV_FILE": str(self.folder / "deepspeed_env"),
            "HOSTNAME": machine.host.name,
            **(env or {}),
        }
        return machine.enter(command, str(cwd or Path.cwd()), env=variables, **popen)

    def kill_host(self, name: str) -> None:
        """End a host as a power failure would: its peers hear nothing more from it. All its processes have
        ended when this returns.

        Raises:
            LabError: there is no such host, or it is down already.
        """
        self._machine(name).power_off()

    def boot_host(self, name: str) -> None:
        """Start a host again that kill_host has ended: same name, address and $TMPDIR.

        Raises:
            LabError: there is no such host, or it is up.
        """
        machine = self._machine(name)
        if machine.up:
            raise LabError(f"host {name} is up")
        self._boot([machine.host])

    def _start(self) -> None:
        self.folder = make_folder()
        (self.folder / "etc-hosts").write_text(etc_hosts(self.hosts))
        (self.folder / "deepspeed_env").write_text(
            "".join(f"{name}={value}\n" for name, value in self._rank_env.items())
        )
        for part in ("tmp", "ssh", *(f"hosts/{host.name}" for host in self.hosts)):
            (self.folder / part).mkdir(parents=True)
        write_ssh(self.folder / "ssh", self.hosts, self._login_env())
        self._supervisor = Supervisor(self.folder, tuple(host.name for host in self.hosts))
        make_switch(self._supervisor.init_pid)
        self._boot(self.hosts)
        self._check_login()

    def _boot(self, hosts) -> None:
        machines = {host.name: Machine(host, self.folder, self._supervisor.init_pid) for host in hosts}
        self._machines.update(machines)
        for machine in machines.values():
            machine.finish_boot()

    def _check_login(self) -> None:
        """Log in on the last host, so that a refused login is reported here and not by a launcher.

        Raises:
            LabError: the login fails.
        """
        last = self.hosts[-1].name
        answer = self.run(["ssh", last, "hostname"], timeout=_LOGIN_TIMEOUT_S, cwd="/")
        if answer.stdout.strip() != last:
            raise LabError(
                f"ssh between the virtual hosts fails: {answer.stderr.strip() or answer.stdout.strip()}"
            )

    def _end(self) -> None:
        if self._supervisor is not None:
            self._supervisor.close()
            for machine in self._machines.values():
                machine.reap()
        elif self.folder is not None:
            shutil.rmtree(self.folder)

    def _machine(self, name: str) -> Machine:
        if name not in self._machines:
            raise LabError(
                f"no host {name!r} in this lab; there are: "
                f"{', '.join(self._machines) or 'none, for it is not running'}"
            )
        return self._machines[name]

    def _login_env(self) -> dict[str, str]:
        """Return the variables of every login on a host, as a site's profile sets them: the folder with
        different contents on each host.
        """
        return {"TMPDIR": str(self.folder / "tmp")}


def _stop(process: EnteredProcess) -> tuple[str, str]:
    """End a command that reads no more input, by SIGTERM or else SIGKILL, and return all of its output."""
    for end in (process.terminate, process.kill):
        end()
        try:
            return process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired as late:
            said = late
    # A process that it started in another session still holds the pipe; it ends with the lab.
    return tuple((part or b"").decode(errors="replace") for part in (said.output, said.stderr))


def _rank_env() -> dict[str, str]:
    """Return the variables that a rank needs on a virtual host: PATH with the interpreter's folder first, the
    CPU as device, and the network interface.

    The others are needed because the machine is small and root is the only user: one thread per rank, mpirun
    allowed for root, and ranks of Open MPI that yield the core while they wait.
    """
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }

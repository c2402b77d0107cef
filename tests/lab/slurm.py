"""A real Slurm on one machine: the daemons of Debian's packages on the hosts of a virtual cluster.

    with SlurmOnOneMachine(nodes=2, cpus=4) as slurm:
        job = slurm.sbatch("launchers/slurm.sbatch", ["federation.rounds=2"])
        print(job.wait(timeout=120).state)

The configuration, ports, sockets, spool and state live on the virtual hosts, and the daemons end with them.
"""

import os
import re
import secrets
import shutil
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.lab import cluster
from tests.lab.errors import LabError
from tests.lab.hosts import place

_TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "sinfo")
_COMMAND_TIMEOUT_S = 120.0
_READY_TIMEOUT_S = 240.0
_POLL_S = 0.1
_MUNGE_SOCKET = "/run/munge.socket"  # must be in a folder open to all users; /run is separate on each host
_NULL_DEVICE = (1, 3)  # of /dev/null; Slurm needs a device for every GPU and never opens it
_UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")

# No cgroups and no accounting, because both would affect the machine outside the lab. `config_overrides` and
# OverSubscribe allow nodes with more CPUs than the machine. The GPUs are devices like /dev/null, so that a
# script that asks for GPUs can be submitted unchanged. The lab's tmp is separate on each host. KillWait is
# the time between SIGTERM and SIGKILL in seconds. KillOnBadExit is a setting of strict sites that launch
# scripts must support.
_CONFIG = """\
ClusterName=lab
SlurmctldHost={head}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket}
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SlurmdParameters=config_overrides
MailProg=/bin/true
ReturnToService=2
KillWait=4
KillOnBadExit=1
TmpFS={tmp}
StateSaveLocation={tmp}/slurmctld
SlurmdSpoolDir={tmp}/slurmd
SlurmctldPidFile={tmp}/slurmctld.pid
SlurmdPidFile={tmp}/slurmd.pid
SlurmctldLogFile={tmp}/slurmctld.log
SlurmdLogFile={tmp}/slurmd.log
GresTypes=gpu
{nodes}
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def why_not() -> str | None:
    """Return the reason why this machine cannot run the virtual Slurm; None if it can."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}; docs/virtual-cluster.md lists the packages"
    return cluster.why_not()


@dataclass(frozen=True)
class JobStatus:
    """`state` as Slurm names it, such as COMPLETED or CANCELLED; `exit_code` of the batch script; `restarts`:
    how often it was requeued.
    """

    state: str
    exit_code: int
    restarts: int

    @property
    def finished(self) -> bool:
        return self.state not in _UNFINISHED


class SlurmJob:
    """A submitted job."""

    def __init__(self, slurm: "SlurmOnOneMachine", job_id: str):
        self._slurm = slurm
        self.id = job_id

    def status(self) -> JobStatus:
        said = self._slurm.check(["scontrol", "--oneliner", "show", "job", self.id])
        fields = dict(re.findall(r"(\S+?)=(\S*)", said))
        return JobStatus(
            fields["JobState"], int(fields["ExitCode"].partition(":")[0]), int(fields["Restarts"])
        )

    def wait(self, timeout: float) -> JobStatus:
        """Wait until the job has ended.

        Raises:
            LabError: it has not, after `timeout` seconds.
        """
        return self.wait_for(lambda status: status.finished, timeout)

    def wait_for(self, condition, timeout: float) -> JobStatus:
        """Wait until `condition(status)` is true and return that status.

        Raises:
            LabError: it does not, after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not condition(status := self.status()):
            if time.monotonic() > deadline:
                raise LabError(f"job {self.id} is {status.state} after {timeout:.0f} s\n{self._slurm.logs()}")
            time.sleep(_POLL_S)
        return status

    def cancel(self, *options: str) -> None:
        """End the job with `scancel`, or signal it with options such as "--signal=TERM", "--batch"."""
        self._slurm.check(["scancel", *options, self.id])


class SlurmOnOneMachine:
    """A Slurm cluster of `nodes` virtual hosts that runs during the `with` block. The first node is also the
    controller.

    Args:
        cpus: CPUs that each node claims to have; they may exceed the machine's.
        gpus: GPUs that each node claims to have; CUDA finds none.

    Attributes:
        lab: the VirtualCluster beneath.
        env: variables that Slurm's client programs need.
    """

    def __init__(self, nodes: int = 1, cpus: int = 4, gpus: int = 0):
        self._names = [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus = cpus
        self._gpus = gpus
        self.lab = cluster.VirtualCluster(place([(name, cpus, None) for name in self._names]))
        self.env: dict[str, str] = {}

    def __enter__(self) -> Self:
        if reason := why_not():
            raise LabError(f"no Slurm on this machine: {reason}")
        self.lab.__enter__()
        try:
            self._start()
        except BaseException:
            self.lab.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.lab.__exit__()

    def run(
        self,
        command: list[str],
        timeout: float = _COMMAND_TIMEOUT_S,
        env: dict[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> subprocess.CompletedProcess:
        """Run `command`, such as srun, on the first node, as VirtualCluster.run does."""
        return self.lab.run(command, timeout, env={**self.env, **(env or {})}, cwd=cwd)

    def check(
        self, command: list[str], env: dict[str, str] | None = None, cwd: Path | str | None = None
    ) -> str:
        """Run a command as `run` does and return its output.

        Raises:
            LabError: it failed.
        """
        done = self.run(command, env=env, cwd=cwd)
        if done.returncode != 0:
            raise LabError(
                f"`{' '.join(map(str, command))}` failed with {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout

    def sbatch(
        self,
        script: Path | str,
        args: list[str] = (),
        options: list[str] = (),
        env: dict[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> SlurmJob:
        """Submit a batch script with `args`; `options` are sbatch's own and override the script's #SBATCH
        lines.

        Raises:
            LabError: Slurm refuses it.
        """
        said = self.check(["sbatch", "--parsable", *options, str(script), *args], env, cwd)
        return SlurmJob(self, said.strip())

    def _start(self) -> None:
        folder = self.lab.folder
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        tmp = folder / "tmp"
        names = ",".join(self._names)
        nodes = f"NodeName={names} CPUs={self._cpus} Gres=gpu:{self._gpus} State=UNKNOWN"
        (folder / "slurm.conf").write_text(
            _CONFIG.format(head=self._names[0], tmp=tmp, socket=_MUNGE_SOCKET, nodes=nodes)
        )
        gpus = [tmp / f"gpu{number}" for number in range(self._gpus)]
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        # cgroups are not used, but slurmd needs a plugin and would otherwise look for the machine's.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")

        for name in self._names:
            host_tmp = folder / "hosts" / name  # the host's `tmp`
            for part in ("slurmctld", "slurmd"):
                (host_tmp / part).mkdir()
            for gpu in gpus:
                os.mknod(host_tmp / gpu.name, stat.S_IFCHR | 0o600, os.makedev(*_NULL_DEVICE))
            self._daemon(
                name,
                [
                    "munged",
                    f"--key-file={key}",
                    f"--socket={_MUNGE_SOCKET}",
                    f"--pid-file={tmp}/munged.pid",
                    f"--log-file={tmp}/munged.log",
                    f"--seed-file={tmp}/munged.seed",
                ],
            )
        self._daemon(self._names[0], ["slurmctld"])
        for name in self._names:
            self._daemon(name, ["slurmd"])
        self._wait_idle()

    def _daemon(self, host: str, command: list[str]) -> None:
        """Start a daemon on a host; it goes to the background when it is ready.

        Raises:
            LabError: it does not start.
        """
        done = self.lab.run(command, _COMMAND_TIMEOUT_S, host=host, env=self.env, cwd="/")
        if done.returncode != 0:
            raise LabError(f"{command[0]} does not start on {host}: {done.stderr.strip()}\n{self.logs()}")

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while (done := self.run(["sinfo", "--noheader", "--Node", "--format=%T"])).stdout.split() != [
            "idle"
        ] * len(self._names):
            if time.monotonic() > deadline:
                raise LabError(
                    f"Slurm's nodes are not ready after {_READY_TIMEOUT_S:.0f} s: {done.stdout} "
                    f"{done.stderr}\n{self.logs()}"
                )
            time.sleep(_POLL_S)

    def logs(self) -> str:
        """Return the last ten lines of each daemon's log; outside, a host's tmp is the folder hosts/NAME."""
        logs = sorted(self.lab.folder.glob("hosts/*/*.log"))
        return "\n".join(
            f"--- {log.parent.name} {log.name}\n" + "\n".join(log.read_text().splitlines()[-10:])
            for log in logs
        )

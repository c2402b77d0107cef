"""Environments and command lines of launchers, and how tests discover a launch from them.

captured_launches.json has the environments and the ancestors' command lines of real launchers (DeepSpeed
0.19.8 with pdsh and Open MPI, Open MPI 5.0.11, torchrun 2.13, Slurm 22.05) on two hosts, node1 with two slots
and node2 with one or two; only names of folders and hosts were changed. PBS and MPICH follow their manuals.
"""

import base64
import json
from pathlib import Path

from fedspeed.cluster.discover import discover

CAPTURED = json.loads((Path(__file__).parent / "captured_launches.json").read_text(encoding="utf-8"))
TWO = "node1 slots=2\nnode2 slots=1\n# fed-host node1 gpu=A\n"


def put(folder, name, text):
    """Write a hostfile into the folder of the job and return its path."""
    path = folder / "hostfiles" / name
    path.write_text(text, encoding="utf-8")
    return path


def start(job, env, cmdlines=(), hostfile=None, hostname="node1"):
    """Return the launch that a process with this environment and these ancestors discovers."""
    return discover(
        env,
        [[argument.replace("/job", str(job)) for argument in command] for command in cmdlines],
        hostfile,
        job,
        hostname,
    )


def captured(job, name):
    """Return the launches that the ranks of a captured launch discover."""
    return [start(job, rank["env"], rank["cmdlines"], hostname=rank["hostname"]) for rank in CAPTURED[name]]


def named_slots(launch):
    """Return the name and the slots of each host."""
    return [(host.name, host.slots) for host in launch.hosts]


def world_info(**hosts):
    """Return the command line of DeepSpeed's launcher for these slots by host."""
    text = base64.urlsafe_b64encode(
        json.dumps({host: list(range(slots)) for host, slots in hosts.items()}).encode()
    ).decode()
    return [
        "python3",
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={text}",
        "--node_rank=0",
        "launch.py",
    ]


def torch_env(rank, size, local_rank=0, **more):
    """Return the environment of a rank that torch or DeepSpeed starts."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        **more,
    }


def mpi_env(rank, size, local_rank, local_size, **more):
    """Return the environment of a rank that Open MPI starts."""
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
        "PMIX_NAMESPACE": "prterun-node1-77@1",
        **more,
    }


def slurm_env(rank, *nodes):
    """Return srun's environment of the first of two ranks on the last of `nodes`."""
    return {
        **CAPTURED["srun"][0]["env"],
        "SLURM_STEP_NODELIST": ",".join(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"2(x{len(nodes)})",
        "SLURM_STEP_NUM_TASKS": str(2 * len(nodes)),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_GTIDS": f"{rank},{rank + 1}",
    }

"""How ranks of MPI, Slurm, PBS and torchrun discover their hosts."""

import pytest

from fedspeed.errors import HostfileError
from tests.cluster.launches import CAPTURED, TWO, mpi_env, named_slots, put, start, torch_env


def test_under_mpirun_a_named_file_is_the_layout_even_on_one_machine(job):
    file = put(job, "two", TWO)
    launch = start(job, mpi_env(2, 3, 2, 3), hostfile=file)
    assert (named_slots(launch), launch.local_rank, launch.master_addr) == (
        [("node1", 2), ("node2", 1)],
        2,
        "127.0.0.1",
    )
    with pytest.raises(HostfileError, match="offers 3 slots, but the launcher started 4 ranks"):
        start(job, mpi_env(0, 4, 0, 4), hostfile=file)


def test_mpirun_with_fewer_ranks_than_slots_fills_the_first_hosts(job):
    put(job, "three", "node1 slots=2\nnode2 slots=2\nnode3 slots=2\n")
    command = [["mpirun", "-n", "3", "-hostfile", "hostfiles/three", "python", "launch.py"]]
    assert named_slots(start(job, mpi_env(0, 3, 0, 2), command)) == [("node1", 2), ("node2", 1)]


def test_mpirun_that_numbers_ranks_across_hosts_is_refused(job):
    put(job, "three", "node1 slots=2\nnode2 slots=2\n")
    command = [["mpirun", "--map-by", "node", "--hostfile", "hostfiles/three", "python", "launch.py"]]
    with pytest.raises(HostfileError, match="rank 2 runs on node1, but would belong to node2.*--map-by slot"):
        start(job, mpi_env(2, 4, 1, 2), command)


def test_a_numbering_that_does_not_fit_is_seen_even_if_the_file_knows_other_names(job):
    put(job, "addresses", "127.0.0.11 slots=2\n127.0.0.12 slots=2\n")
    command = [["mpirun", "--map-by", "node", "--hostfile", "hostfiles/addresses", "python", "launch.py"]]
    with pytest.raises(
        HostfileError, match="rank 1 is local rank 0 of 2 on node2, but would be number 1 of 2 on 127.0.0.11"
    ):
        start(job, mpi_env(1, 4, 0, 2), command, hostname="node2")


def test_away_from_mpirun_only_a_file_that_agrees_with_this_rank_counts(job):
    env = mpi_env(2, 3, 0, 1)
    put(job, "other", "node1 slots=1\nnode2 slots=2\n")
    put(job, "strange", "gpu1 slots=2\ngpu2 slots=1\n")
    with pytest.raises(HostfileError, match="rank 2 on node2.*--hostfile FILE"):
        start(job, env, [["prted", "--prtemca", "ess", "env"]], hostname="node2")
    two = put(job, "two", TWO)
    assert start(job, env, [["prted"]], hostname="node2.lab.org").hostfile.path == str(two)


def test_pbs_names_the_hosts(job):
    """PBS Pro sets PBS_JOBID and PBS_NODEFILE, a file with one line per MPI rank; mpirun is given that file
    as its machine file.
    """
    nodefile = job / "aux"
    nodefile.write_text("node1\nnode1\nnode2\n")
    put(job, "two", TWO)
    pbs = {"PBS_JOBID": "42.head", "PBS_NODEFILE": str(nodefile), "PBS_ENVIRONMENT": "PBS_BATCH"}
    command = [["mpirun", "-n", "3", "-machinefile", str(nodefile), "python", "launch.py"]]
    launch = start(job, mpi_env(0, 3, 0, 2, **pbs), command)
    assert (launch.kind, named_slots(launch), launch.hosts[0].gpu) == (
        "openmpi",
        [("node1", 2), ("node2", 1)],
        "A",
    )
    with pytest.raises(HostfileError, match="stands alone in PBS job 42.head of 2 nodes"):
        start(job, pbs)
    nodefile.write_text("node1\nnode1\n")
    assert start(job, pbs).kind == "none"


def test_mpich_ranks(job):
    env = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PBS_JOBID": "7"}
    launch = start(job, env)
    assert (launch.kind, launch.world_rank, launch.world_size, named_slots(launch)) == (
        "mpi",
        1,
        2,
        [("node1", 2)],
    )
    assert launch.master_port == start(job, {**env, "PMI_RANK": "0", "MPI_LOCALRANKID": "0"}).master_port


def test_mpich_started_over_srun_is_not_taken_for_srun(job):
    step = {
        **CAPTURED["srun"][3]["env"],
        "PMI_RANK": "2",
        "PMI_SIZE": "4",
        "MPI_LOCALRANKID": "0",
        "MPI_LOCALNRANKS": "2",
    }
    assert start(job, step, hostname="node2").kind == "mpi"


def test_srun_with_cyclic_distribution_is_refused(job):
    env = {
        **CAPTURED["srun"][0]["env"],
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "1",
        "SLURM_GTIDS": "0,2",
    }
    with pytest.raises(
        HostfileError, match="rank 2 runs on node1, but would belong to node2.*--distribution=block"
    ):
        start(job, env, hostname="node1")


def test_torchrun_inside_a_slurm_job_uses_its_nodes(job):
    env = {**CAPTURED["srun"][3]["env"], **torch_env(2, 4, 0, TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="2")}
    launch = start(job, env, hostname="node2")
    assert (launch.kind, named_slots(launch)) == ("torchrun", [("node1", 2), ("node2", 2)])

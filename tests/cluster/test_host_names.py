"""Host names with and without domains, and hosts that differ only in the domain."""

import pytest

from fedspeed.cluster import hostfile_search
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.hostnames import find_host, is_same_host
from fedspeed.errors import HostfileError
from tests.cluster.launches import mpi_env, named_slots, put, slurm_env, start, torch_env, world_info

SITES = (
    "gpu1.site-a.org slots=2\ngpu1.site-b.org slots=2\n# fed-host gpu1.site-a.org cluster=a gpu=A\n"
    "# fed-host gpu1.site-b.org cluster=b gpu=B\n"
)


def test_names_are_compared_up_to_the_shorter_domain():
    assert is_same_host("node1.lab.org", "node1") and is_same_host("node1.lab", "NODE1.lab.org")
    assert not is_same_host("gpu1.site-a.org", "gpu1.site-b.org")
    assert not is_same_host("node1", "node10.lab.org")
    assert not is_same_host("127.0.0.1", "127.0.0.2") and not is_same_host("10.0", "10.0.0.2")


@pytest.mark.parametrize(
    ("hostname", "found"),
    [
        ("gpu1.site-b.org", 1),
        ("gpu1.site-a.org", 0),
        ("gpu1.site-a", 0),
        ("gpu1", None),
        ("gpu2.infiniband", 2),
        ("gpu2", 2),
        ("gpu1.infiniband", None),
        ("GPU1.Site-B.org", 1),
        ("gpu3", None),
    ],
)
def test_a_host_of_the_job_is_found_by_its_full_name_and_by_a_short_one_that_only_it_has(hostname, found):
    hosts = [Host(name, 1) for name in ("gpu1.site-a.org", "gpu1.site-b.org", "gpu2.site-b.org")]
    assert find_host(hosts, hostname) == (None if found is None else hosts[found])


@pytest.mark.parametrize("hostname", ["gpu1.site-b.org", "gpu1"])
def test_mpirun_over_hosts_that_differ_in_the_domain_only(job, hostname):
    put(job, "sites", SITES)
    command = [["mpirun", "-n", "4", "--hostfile", "hostfiles/sites", "python", "launch.py"]]
    launch = start(job, mpi_env(2, 4, 0, 2), command, hostname=hostname)
    assert named_slots(launch) == [("gpu1.site-a.org", 2), ("gpu1.site-b.org", 2)]
    assert launch.hosts == start(job, mpi_env(2, 4, 0, 2), [["prted"]], hostname=hostname).hosts, (
        "away from mpirun, by the shelf"
    )
    with pytest.raises(
        HostfileError, match=r"rank 2 runs on gpu1.site-a.org, but would belong to gpu1.site-b.org"
    ):
        start(job, mpi_env(2, 4, 0, 2), command, hostname="gpu1.site-a.org")


def test_deepspeed_over_hosts_that_differ_in_the_domain_only(job):
    put(job, "sites", SITES)
    world = world_info(**{"gpu1.site-a.org": 2, "gpu1.site-b.org": 2})
    for hostname in ("gpu1.site-b.org", "gpu1"):
        launch = start(job, torch_env(2, 4, 0), [world], hostname=hostname)
        assert [(host.name, host.cluster) for host in launch.hosts] == [
            ("gpu1.site-a.org", "a"),
            ("gpu1.site-b.org", "b"),
        ]
    assert (
        start(job, torch_env(0, 2), [world_info(**{"gpu1.site-b.org": 2})], hostname="gpu1").hosts[0].cluster
        == "b"
    )


def test_srun_over_hosts_that_differ_in_the_domain_only(job):
    put(job, "sites", SITES)
    launch = start(job, slurm_env(2, "gpu1.site-a.org", "gpu1.site-b.org"), hostname="gpu1.site-b.org")
    assert [(host.name, host.cluster) for host in launch.hosts] == [
        ("gpu1.site-a.org", "a"),
        ("gpu1.site-b.org", "b"),
    ]
    alone = start(job, slurm_env(0, "gpu1.site-b.org"), hostname="gpu1.site-b.org")
    assert (named_slots(alone), alone.hosts[0].cluster) == ([("gpu1.site-b.org", 2)], "b"), (
        "once taken for cluster a"
    )


def test_a_short_name_takes_the_facts_of_one_host_or_of_none(job, monkeypatch):
    put(job, "sites", SITES)
    env = slurm_env(0, "gpu1")
    asked = []
    monkeypatch.setattr(
        hostfile_search.socket, "getfqdn", lambda name: asked.append(name) or "gpu1.site-b.org"
    )
    assert start(job, env, hostname="gpu1").hosts[0].cluster == "b"
    monkeypatch.setattr(hostfile_search.socket, "getfqdn", lambda name: "gpu1.site-c.org")
    assert start(job, env, hostname="gpu1").hosts[0].facts == Host("gpu1", 2).facts
    monkeypatch.setattr(hostfile_search.socket, "getfqdn", lambda name: name)
    with pytest.raises(
        HostfileError,
        match=r"sites: host gpu1 of this job may be gpu1.site-a.org or gpu1.site-b.org, .*--hostfile FILE",
    ):
        start(job, env, hostname="gpu1")
    put(job, "mine", "gpu1 slots=2\n# fed-host gpu1 gpu=MINE\n")
    assert start(job, env, hostname="gpu1").hosts[0].gpu == "MINE", "a file that names it in full"
    (job / "hostfiles" / "sites").write_text("gpu1.site-a.org slots=2\n# fed-host gpu1.site-a.org gpu=A\n")
    (job / "hostfiles" / "mine").unlink()
    assert start(job, slurm_env(0, "gpu1.site-b.org"), hostname="gpu1.site-b.org").hosts[0].gpu is None
    assert start(job, env, hostname="gpu1").hosts[0].gpu == "A"
    assert asked == ["gpu1"], "the name service is asked only where it must be"


def test_pbs_over_hosts_that_differ_in_the_domain_only(job):
    nodefile = job / "aux"
    nodefile.write_text("gpu1.site-a.org\n" * 2 + "gpu1.site-b.org\n" * 2)
    put(job, "sites", SITES)
    pbs = {"PBS_JOBID": "42.head", "PBS_NODEFILE": str(nodefile)}
    launch = start(job, mpi_env(2, 4, 0, 2, **pbs), hostname="gpu1.site-b.org")
    assert [(host.name, host.slots, host.cluster) for host in launch.hosts] == [
        ("gpu1.site-a.org", 2, "a"),
        ("gpu1.site-b.org", 2, "b"),
    ]

"""Every transport, and the exchange on top of it, against one contract. Each runs as it is used: as threads,
as processes, under mpirun.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedspeed.errors import ConfigError, FedSpeedError, LostPeerError, connection_text
from fedspeed.routing.channel import Channel
from fedspeed.routing.config import TRANSPORTS
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.listen_address import own_membership
from fedspeed.routing.opening import resolve
from fedspeed.routing.transport import PeersLost, TransportError, all_gather
from fedspeed.routing.transports.local import LocalTransport
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.processes import free_port, run_ranks
from tests.routing.contract import contract, gloo_rank, in_threads, opened
from tests.routing.sites import Sites


def by_threads(folder, size: int) -> list:
    return in_threads(LocalTransport.set_of(size), contract)


def by_processes(folder, size: int) -> list:
    return run_ranks(size, gloo_rank, size, free_port(), contract, timeout=LIMIT_S)


MPI_PROGRAM = """
import json
import numpy as np
import pytest
from mpi4py import MPI
from fedspeed.routing.transport import PeersLost
from tests.routing.contract import contract
from fedspeed.routing.opening import TransportContext, open_transport
from fedspeed.routing.transports.frames import MESSAGE
idle, size = {idle}, {size}
world = MPI.COMM_WORLD
gateways = tuple(range(idle, idle + size))
given = dict(participants=gateways, world_size=world.size, timeout_s=60)
context = TransportContext(asked="mpi", me=world.rank, **given)
t = open_transport("mpi", context)
r = contract(t) if t.rank >= 0 else None
if size > 1 and t.rank == 0:
    t._comm.Send(np.array([*MESSAGE, 1 << 40]), 1)
if size > 1 and t.rank == 1:
    announced = "participant 0 sent a message of 1099511627776 bytes; at most 1000 are accepted"
    with pytest.raises(PeersLost, match=announced):
        t.receive(0, 60, 1000)
t.close()
print("RESULT", json.dumps(r))
"""


def by_mpirun(folder, size: int) -> list:
    """Run several participants between two idle ranks, since participants need not be the first ranks."""
    idle = int(size > 1)
    ranks = size + 2 * idle
    done = subprocess.run(
        [
            "mpirun",
            "--oversubscribe",
            "-n",
            str(ranks),
            sys.executable,
            "-c",
            MPI_PROGRAM.format(idle=idle, size=size),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    results = [
        json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("RESULT")
    ]
    assert len(results) == ranks
    return [result for result in results if result]


def by_sites(folder, size: int) -> list:
    sites = Sites(folder, size)

    def site(i: int) -> dict:
        transport = opened("tls", i, size, member=own_membership(sites.routing(i)))
        try:
            return contract(transport)
        finally:
            transport.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(site, range(size)))


# By transport, how its participants are started, and how many.
STARTED = {
    "local": (by_threads, (1, 2, 3, 5)),
    "gloo": (by_processes, (1, 3)),
    "mpi": (by_mpirun, (1, 3)),
    "tls": (by_sites, (2, 3, 5)),
}


def test_every_transport_is_held_to_the_contract():
    assert STARTED.keys() == TRANSPORTS.keys()


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, (_, sizes) in STARTED.items() for size in sizes]
)
def test_contract(tmp_path, name, size):
    results = STARTED[name][0](tmp_path, size)
    assert len(results) == size
    assert len({result["digest"] for result in results}) == 1


@pytest.mark.parametrize(
    ("asked", "launcher", "participants", "name"),
    [
        ("auto", "local", 1, "local"),
        ("auto", "local", 3, "gloo"),
        ("auto", "deepspeed", 3, "gloo"),
        ("auto", "slurm", 2, "gloo"),
        ("auto", "openmpi", 1, "local"),
        ("auto", "openmpi", 2, "mpi"),
        ("mpi", "slurm", 1, "mpi"),
        ("gloo", "openmpi", 2, "gloo"),
        ("gloo", "local", 1, "local"),
        ("local", "local", 1, "local"),
        ("tls", "openmpi", 1, "tls"),
    ],
)
def test_the_transport_of_a_job(asked, launcher, participants, name):
    assert resolve(asked, launcher, participants) == name


def test_several_processes_are_no_threads():
    with pytest.raises(
        ConfigError,
        match="routing.transport=local is for a single participant, but 3 ranks speak for clients; set "
        "routing.transport=auto",
    ):
        resolve("local", "local", 3)


class Late:
    """A roll call in which participant 1 never arrives."""

    def arrive(self, tag):
        pass

    def missing(self, tag):
        return ["client 1 (rank 1)"]


def test_a_missing_participant_is_named_within_the_deadline():
    transports = LocalTransport.set_of(2)
    begin = time.monotonic()
    with pytest.raises(LostPeerError, match=r"the update of client 1 \(rank 1\) is missing"):
        PlainExchange(transports[0], deadline_s=0.3, arrivals=Late()).start(np.zeros(4), 1.0).wait(LIMIT_S)
    assert time.monotonic() - begin < LIMIT_S


def die_or_report(report, transport):
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        all_gather(transport, np.zeros(2), LIMIT_S)
    except TransportError as error:
        report.write_text(f"{time.monotonic() - begin} {error}")
        raise


def test_gloo_notices_a_killed_participant_long_before_the_deadline(tmp_path):
    with pytest.raises(AssertionError, match="rank 1:\ndied without a word"):
        run_ranks(
            2,
            gloo_rank,
            2,
            free_port(),
            functools.partial(die_or_report, tmp_path / "report"),
            timeout=LIMIT_S,
        )
    assert float((tmp_path / "report").read_text().split()[0]) < LIMIT_S / 10


def start_with_own_length(transport):
    with pytest.raises(FedSpeedError, match="disagree"):
        PlainExchange(transport, LIMIT_S).start(np.zeros(3 + transport.rank), 1.0).wait(LIMIT_S)


def test_different_lengths_are_refused_on_every_side():
    in_threads(LocalTransport.set_of(3), start_with_own_length)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float32 or float64"):
        PlainExchange(LocalTransport.set_of(1)[0], 5).start(np.zeros(3, dtype=np.int64), 1.0)


LOST_SCRIPT = """
import time, numpy as np
from fedspeed.errors import LostPeerError
from fedspeed.routing.arrivals import NoArrivalTracker
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.transports.local import LocalTransport
class Roll(NoArrivalTracker):
    def lost(self): return ["client 1 (rank 1 on beta)"]
begin = time.monotonic()
try:
    PlainExchange(LocalTransport.set_of(2)[0], 500, Roll()).start(np.zeros(4), 1.0).wait(500)
except LostPeerError as error:
    print(time.monotonic() - begin, error)
"""


def test_a_lost_participant_ends_the_wait_and_the_process_long_before_the_deadline():
    done = subprocess.run(
        [sys.executable, "-c", LOST_SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < LIMIT_S / 10
    assert "the update of client 1 (rank 1 on beta) is missing" in message


def test_the_text_of_a_broken_connection_leaves_out_torchs_advice():
    text = (
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:26021. This is typically "
        "caused by a remote worker crashing. Check the logs of the remote worker before reporting an error. "
        "GLHF! \U0001f3d6\nand a trace"
    )
    assert connection_text(RuntimeError(text)) == "Connection closed by peer [127.0.0.1]:26021"
    assert (
        connection_text(RuntimeError("timed out\nmore")) == "timed out"
        and connection_text(RuntimeError()) == "RuntimeError"
    )


def test_messages_and_swaps_do_not_take_each_others_frames():
    """A message that arrives during a swap is kept for `receive`, and a frame of a swap that arrives during
    `receive` is kept for the swap.
    """
    one, other = LocalTransport.set_of(2)
    one.send(1, np.arange(5, dtype=np.uint8), 1.0)
    with pytest.raises(PeersLost, match="in time"):
        one.swap([b"", b"a"], [0, 1], 0.05)
    assert bytes(other.swap([b"b", b""], [1, 0], 1.0)[0]) == b"a"
    assert other.receive(0, 1.0, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_message_without_arrays_is_refused():
    one, other = LocalTransport.set_of(2)
    channel = Channel(other, 0.05)
    one.send(1, np.frombuffer(b"anything", np.uint8), 1.0)
    with pytest.raises(FedSpeedError, match="participant 0 sent a message that holds no arrays"):
        channel.receive(0)
    with pytest.raises(LostPeerError, match="participant 0 sent no message"):
        channel.receive(0)

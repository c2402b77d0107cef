"""Members killed by SIGKILL in every phase of the protocol: real processes over TLS, one of which dies (and
another one during the recovery).
"""

import os
import signal
import time

import numpy as np
import pytest

from fedspeed.routing.anonymous.attempts import PHASES
from fedspeed.routing.anonymous.exchange import AnonymousExchange
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.identity import read_key, read_roster
from fedspeed.routing.listen_address import listen_address
from fedspeed.routing.transports.tls import TlsTransport
from tests.limits import LIMIT_S
from tests.processes import run_ranks
from tests.routing.sites import Sites

MEMBERS = 5
WORDS = 1500
CONFIG = RoutingConfig(
    mode="mix+mask", transport="tls", cell_kib=1, deadline_s=LIMIT_S, step_deadline_s=LIMIT_S
)
PHASES_PLAYED = (
    "announce",
    "reveal",
    "hop 0",
    "hop 1",
    "hop 2",
    "collect",
    "confirm",
    "unmask",
    "sums",
    "challenge",
    "done",
)
MOMENTS = ("before", "midway", "after")


class Mortal(TlsTransport):
    """A transport whose process dies in a phase of the second exchange: before it sends anything, after it
    has sent to two members, or after it has sent to all and before it receives anything.
    """

    dies_in = -1
    moment = ""
    exchange = 0
    _sent = 0

    def swap(self, parts, sizes, deadline_s, step=(0, 1)):
        self._due = self.exchange == 2 and step[1] == self.dies_in
        self._sent = 0
        if self._due and self.moment == "before":
            self._die()
        return super().swap(parts, sizes, deadline_s, step)

    def send_frame(self, peer, frame, deadline_s):
        super().send_frame(peer, frame, deadline_s)
        self._sent += 1
        if self._due and self.moment == "midway" and self._sent == 2:
            self._die()

    def _read_all(self, reads):
        if self._due:
            self._die()
        return super()._read_all(reads)

    def _die(self):
        time.sleep(0.1)  # for what was sent to leave
        os.kill(os.getpid(), signal.SIGKILL)


def vector(rank: int, number: int) -> np.ndarray:
    return np.random.default_rng([rank, number]).integers(-1000, 1000, WORDS).astype(np.float64)


def member(rank, folder, pinned, deaths, moment):
    """Make three exchanges; return (sum, set of members in it) of each. Weights are powers of two, so that
    their sum names the members.
    """
    roster = read_roster(folder / "roster.json", pinned)
    key_file = folder / f"site{rank}.key"
    transport = Mortal(
        str(key_file), roster.keys[rank], roster, LIMIT_S, listen_address(CONFIG, roster.members[rank])
    )
    transport.dies_in = PHASES.index(deaths[rank]) if rank in deaths else -1
    transport.moment = moment
    exchange = AnonymousExchange(transport, CONFIG, read_key(key_file), roster.keys, b"settings")
    sums = []
    for number in (1, 2, 3):
        transport.exchange = number
        total, weights = exchange.start(vector(rank, number), float(1 << rank)).wait(LIMIT_S)
        sums.append((total, int(weights)))
    exchange.close()
    return sums


def all_go_on(tmp_path, deaths: dict[int, str], moment: str) -> None:
    """Check that the survivors agree on every sum, and that a committed set has all members."""
    sites = Sites(tmp_path, MEMBERS)
    found = run_ranks(
        MEMBERS,
        member,
        tmp_path,
        sites.pinned,
        deaths=deaths,
        moment=moment,
        timeout=LIMIT_S,
        mortal=frozenset(deaths),
    )
    survivors = [i for i in range(MEMBERS) if i not in deaths]
    assert [i for i, sums in enumerate(found) if sums is not None] == survivors
    for number in range(3):
        totals, sets = zip(*(found[i][number] for i in survivors))
        counted = [i for i in range(MEMBERS) if sets[0] >> i & 1]
        assert set(sets) == {sets[0]} and set(survivors) <= set(counted)
        for total in totals:
            np.testing.assert_array_equal(total, sum(vector(i, number + 1) for i in counted))
        if number != 1:
            assert counted == (survivors if number else list(range(MEMBERS)))
    opened = all(PHASES.index(phase) > PHASES.index("unmask") for phase in deaths.values())
    if opened or all(PHASES.index(phase) < PHASES.index("confirm") for phase in deaths.values()):
        assert found[survivors[0]][1][1] == (2**MEMBERS - 1 if opened else sum(1 << i for i in survivors))


@pytest.mark.parametrize(
    "phase,moment,victim", [(phase, MOMENTS[i % 3], i % MEMBERS) for i, phase in enumerate(PHASES_PLAYED)]
)
def test_one_dies(tmp_path, phase, moment, victim):
    """Every member is a source, a relay, an owner and a backup; the beacon decides for which chunks."""
    all_go_on(tmp_path, {victim: phase}, moment)


@pytest.mark.slow
@pytest.mark.parametrize("victim", range(MEMBERS))
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("phase", PHASES_PLAYED)
def test_whoever_dies_whenever(tmp_path, phase, moment, victim):
    all_go_on(tmp_path, {victim: phase}, moment)


@pytest.mark.parametrize("phase", ["hop 1", "unmask"])
def test_another_one_dies_during_the_recovery(tmp_path, phase):
    all_go_on(tmp_path, {1: phase, 3: "recover"}, "midway")

"""kill -9 in every state of the protocol: real processes that meet over TLS, one of which dies (and another
one, while they settle it).
"""

import os
import signal
import time

import numpy as np
import pytest

from fedspeed.routing.anonymous.exchange import PHASES, AnonymousExchange
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.identity import read_key, read_roster
from fedspeed.routing.listening import listen_address
from fedspeed.routing.transports.tls import TlsTransport
from tests.limits import LIMIT_S
from tests.processes import run_ranks
from tests.routing.sites import Sites

MEMBERS = 5
WORDS = 1500
RULES = RoutingConfig(
    mode="mix+mask", transport="tls", cell_kib=1, deadline_s=LIMIT_S, step_deadline_s=LIMIT_S
)
STATES_PLAYED = (
    "announce",
    "reveal",
    "hop 0",
    "hop 1",
    "hop 2",
    "collect",
    "vote",
    "confirm",
    "unmask",
    "sums",
    "done",
)
MOMENTS = ("before", "midway", "after")


class Mortal(TlsTransport):
    """Dies in a state of the second exchange: before it says a word, when some have heard it, or when all
    have and it has heard nobody.
    """

    dies_in = -1
    moment = ""
    exchange = 0
    _said = 0

    def swap(self, parts, sizes, deadline_s, step=(0, 1)):
        self._due = self.exchange == 2 and step[1] == self.dies_in
        self._said = 0
        if self._due and self.moment == "before":
            self._die()
        return super().swap(parts, sizes, deadline_s, step)

    def _send(self, peer, frame, deadline_s):
        super()._send(peer, frame, deadline_s)
        self._said += 1
        if self._due and self.moment == "midway" and self._said == 2:
            self._die()

    def _receive(self, peer, timeout_s):
        if self._due:
            self._die()
        return super()._receive(peer, timeout_s)

    def _die(self):
        time.sleep(0.1)  # for what has been said to leave
        os.kill(os.getpid(), signal.SIGKILL)


def vector(rank: int, number: int) -> np.ndarray:
    return np.random.default_rng([rank, number]).integers(-1000, 1000, WORDS).astype(np.float64)


def member(rank, folder, pinned, deaths, moment):
    roster = read_roster(folder / "roster.json", pinned)
    key_file = folder / f"site{rank}.key"
    transport = Mortal(
        str(key_file), roster.keys[rank], roster, LIMIT_S, listen_address(RULES, roster.members[rank])
    )
    transport.dies_in = PHASES.index(deaths[rank]) if rank in deaths else -1
    transport.moment = moment
    exchange = AnonymousExchange(transport, RULES, read_key(key_file), roster.keys, b"settings")
    told = []
    for number in (1, 2, 3):
        transport.exchange = number
        total, weights = exchange.start(vector(rank, number), float(1 << rank)).wait(LIMIT_S)
        told.append((total, int(weights)))
    exchange.close()
    return told


def all_go_on(tmp_path, deaths: dict[int, str], moment: str) -> None:
    sites = Sites(tmp_path, MEMBERS)
    found = run_ranks(
        MEMBERS, member, tmp_path, sites.pinned, deaths, moment, timeout=LIMIT_S, mortal=frozenset(deaths)
    )
    survivors = [i for i in range(MEMBERS) if i not in deaths]
    assert [i for i, told in enumerate(found) if told is not None] == survivors
    for at in range(3):
        totals, sets = zip(*(found[i][at] for i in survivors))
        counted = [i for i in range(MEMBERS) if sets[0] >> i & 1]
        assert set(sets) == {sets[0]} and set(survivors) <= set(counted)
        for total in totals:
            np.testing.assert_array_equal(total, sum(vector(i, at + 1) for i in counted))
        if at != 1:
            assert counted == (survivors if at else list(range(MEMBERS)))
    committed = all(PHASES.index(state) > PHASES.index("confirm") for state in deaths.values())
    if committed or all(PHASES.index(state) < PHASES.index("confirm") for state in deaths.values()):
        assert found[survivors[0]][1][1] == (2**MEMBERS - 1 if committed else sum(1 << i for i in survivors))


@pytest.mark.parametrize(
    "state,moment,victim", [(state, MOMENTS[i % 3], i % MEMBERS) for i, state in enumerate(STATES_PLAYED)]
)
def test_one_dies(tmp_path, state, moment, victim):
    """Everybody is source, relay, owner and keeper of another's sums; which of them for which chunk, the
    beacon decides.
    """
    all_go_on(tmp_path, {victim: state}, moment)


@pytest.mark.slow
@pytest.mark.parametrize("victim", range(MEMBERS))
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("state", STATES_PLAYED)
def test_whoever_dies_whenever(tmp_path, state, moment, victim):
    all_go_on(tmp_path, {victim: state}, moment)


@pytest.mark.parametrize("state", ["hop 1", "unmask"])
def test_another_one_dies_while_the_first_is_settled(tmp_path, state):
    all_go_on(tmp_path, {1: state, 3: "recover"}, "midway")

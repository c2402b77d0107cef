"""One update is never summed over two sets: after a crash, after a loss of power, with members that lie."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import LostPeerError
from fedspeed.routing.anonymous import settlement
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.anonymous.exchange import AnonymousExchange, exchange_public_keys
from fedspeed.routing.anonymous.lockstep import Kill, play
from fedspeed.routing.anonymous.settlement import NO_MARK, OTHER_VECTOR, Mark, announced_mark, reasons_to_skip
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.identity import read_key
from fedspeed.routing.transports.local import LocalTransport
from fedspeed.session.settled_marks import FileMarks
from tests.limits import LIMIT_S
from tests.routing.anonymous.parties import Parties
from tests.routing.contract import in_threads
from tests.routing.sites import Sites

CONFIG = RoutingConfig(
    "mix+mask", cell_kib=4, step_deadline_s=LIMIT_S, deadline_s=LIMIT_S, min_participants=2
)
LABEL = "update of round 3"


def update(i: int) -> np.ndarray:
    """Return the update of organisation i, the same whenever it trains the round again."""
    return np.random.default_rng(i).normal(size=2000).astype(np.float32)


def test_what_is_announced_of_a_mark():
    mark = Mark(b"s" * 32, b"v" * 32)
    assert announced_mark(None, b"v" * 32) == NO_MARK
    assert announced_mark(mark, b"v" * 32) == mark.members
    assert announced_mark(mark, b"w" * 32) == OTHER_VECTOR


def test_all_skip_if_anybody_has_settled_another_sum():
    """Also those without a mark: alone among zeros, their own update would be the sum."""
    this = b"s" * 32
    assert not reasons_to_skip([NO_MARK, this, NO_MARK], this)
    assert reasons_to_skip([NO_MARK, b"t" * 32, NO_MARK], this) == {1}
    assert reasons_to_skip([this, this, OTHER_VECTOR], this) == {2}


class Organisations:
    """Organisations that take part in sums in several starts.

    Attributes:
        keys, marks: by organisation; the marks outlive a start.
    """

    def __init__(self, n: int):
        self.keys = [Ed25519PrivateKey.generate() for _ in range(n)]
        self.marks = [settlement.MemoryMarks() for _ in range(n)]

    def start(self, present, settings: bytes, updates=update):
        """Make one sum of the organisations that are present; return (sum, weight, skipped) of each."""
        roster = [public_bytes(self.keys[i]) for i in present]

        def act(transport):
            i = present[transport.rank]
            exchange = AnonymousExchange(
                transport, CONFIG, self.keys[i], roster, settings, marks=self.marks[i]
            )
            handle = exchange.start(updates(i), 1.0, label=LABEL)
            total, weight = handle.wait(LIMIT_S)
            return total, weight, handle.skipped

        return in_threads(LocalTransport.set_of(len(present)), act)


def difference_names_somebody(first, second, missing: int) -> bool:
    """Return whether the difference of two sums is the update of the organisation in the first one only."""
    return bool(np.abs(first - second - update(missing)).max() < 1e-3)


def test_a_round_that_is_trained_again_with_fewer_members_is_skipped(monkeypatch):
    """Nobody lies: power was lost before the round was journalled, and one organisation has left since."""
    organisations = Organisations(4)
    first = organisations.start([0, 1, 2, 3], b"first")
    second = organisations.start([0, 1, 2], b"second")
    assert all(weight == 4 and not skipped for _, weight, skipped in first)
    assert all(weight == 0 and skipped and not total.any() for total, weight, skipped in second)
    assert not difference_names_somebody(first[0][0], second[0][0], 3)
    # Without the rule the difference is the update of whoever has left.
    monkeypatch.setattr("fedspeed.routing.anonymous.commitment.reasons_to_skip", lambda *_: frozenset())
    third = organisations.start([0, 1, 2], b"third")
    assert difference_names_somebody(first[0][0], third[0][0], 3)


def test_the_same_set_sums_the_same_again():
    """To the last bit: with another sum, the next round would have another update than that of its mark."""
    organisations = Organisations(3)
    first = organisations.start([0, 1, 2], b"first")
    second = organisations.start([0, 1, 2], b"second")
    for (a, wa, _), (b, wb, skipped) in zip(first, second):
        assert wa == wb == 3 and not skipped
        assert a.tobytes() == b.tobytes()


def test_the_order_of_the_roster_makes_no_other_set():
    organisations = Organisations(3)
    organisations.start([0, 1, 2], b"first")
    assert not any(skipped for _, _, skipped in organisations.start([2, 0, 1], b"second"))


def test_another_vector_of_one_organisation_skips_the_round_for_all():
    organisations = Organisations(3)
    organisations.start([0, 1, 2], b"first")
    second = organisations.start([0, 1, 2], b"second", lambda i: update(i) + np.float32(i == 1))
    assert all(weight == 0 and skipped for _, weight, skipped in second)


def test_an_organisation_that_has_lost_its_marks_is_not_alone_among_zeros():
    organisations = Organisations(4)
    organisations.start([0, 1, 2, 3], b"first")
    organisations.marks[1] = settlement.MemoryMarks()
    assert all(weight == 0 and skipped for _, weight, skipped in organisations.start([0, 1, 2], b"second"))


@pytest.mark.parametrize("heard_by", [set(), {1}])
def test_the_mark_is_written_before_the_secret_leaves(heard_by):
    """Whoever could open a sum with somebody's update in it, that one knows that it could."""
    parties = Parties(4)
    members = parties.attempt()
    settled = []
    for i, member in enumerate(members):
        member._settle = lambda i=i: settled.append(i)
    left = set()

    def watch(phase, messages):
        if phase in ("unmask", "secrets"):
            for (sender, _), message in messages.items():
                left.update({sender} if message else ())
            assert left <= set(settled)

    play(members, watch, kills=[Kill(2, "unmask", frozenset(heard_by))])
    assert left and set(settled) == {0, 1, 2, 3}


def test_a_mark_that_cannot_be_written_keeps_the_secret_at_home():
    parties = Parties(3)
    members = parties.attempt()

    def fail():
        raise OSError("no space left")

    members[1]._settle = fail
    with pytest.raises(OSError, match="no space left"):
        play(members)
    assert 1 not in members[0]._self_secrets


@pytest.mark.parametrize("n", [3, 4])
def test_over_tls_a_second_start_with_fewer_sites_gives_nothing(tmp_path, n):
    """Sites, sockets and files of marks as in a run; the last site is gone at the second start, or stays."""
    sites = Sites(tmp_path, n)

    def act(transport, settings):
        rank = transport.rank
        exchange = AnonymousExchange(
            transport,
            CONFIG,
            read_key(tmp_path / f"site{rank}.key"),
            sites.roster.keys,
            settings,
            marks=FileMarks(tmp_path / f"run{rank}"),
        )
        if settings == b"second" and rank == n - 1:
            exchange.close()
            return None
        handle = exchange.start(update(rank), 1.0, label=LABEL)
        try:
            total, weight = handle.wait(LIMIT_S)
        except LostPeerError as error:
            return str(error)
        finally:
            if settings != b"first":
                exchange.close()
        return total, weight, handle.skipped

    for rank in range(n):
        (tmp_path / f"run{rank}").mkdir()
    first = in_threads(sites.all(), lambda t: (act(t, b"first"), t.close())[0])
    assert all(weight == n and not skipped for _, weight, skipped in first)
    for total, weight, skipped in in_threads(sites.all(), lambda t: act(t, b"again")):
        assert (weight, skipped) == (n, False)
        assert total.tobytes() == first[0][0].tobytes()
    second = in_threads(sites.all(), lambda t: act(t, b"second"))[:-1]
    assert all(weight == 0 and skipped for _, weight, skipped in second)


def test_updates_of_different_states_are_not_summed():
    """A member that was given a state of its own would reveal its update by the difference."""
    organisations = Organisations(3)
    roster = [public_bytes(key) for key in organisations.keys]

    def act(transport):
        exchange = AnonymousExchange(
            transport, CONFIG, organisations.keys[transport.rank], roster, b"settings"
        )
        state = b"another" if transport.rank == 1 else b"common"
        with pytest.raises(LostPeerError, match="do not have the state and the round that member"):
            exchange.start(update(transport.rank), 1.0, label=LABEL, state=state).wait(LIMIT_S)

    in_threads(LocalTransport.set_of(3), act)


def test_an_update_is_opened_with_one_rounding_only():
    """With bounds of its choice, a liar could open it often, each time with another rounding: for two honest
    members, the steps of the two roundings would show both values.
    """

    def act(transport):
        identity = Ed25519PrivateKey.generate()
        roster = exchange_public_keys(transport, LIMIT_S, identity)
        exchange = AnonymousExchange(transport, CONFIG, identity, roster, b"run")
        vector = np.full(10, 0.25, np.float32)
        found = []
        for bound in (8.0, 8.0, 1e6):
            handle = exchange.start(vector, 1.0, bounds=np.array([bound]), label="update")
            found.append((float(handle.wait(LIMIT_S)[0][0]), handle.skipped))
        return found

    for found in in_threads(LocalTransport.set_of(3), act):
        assert found[0] == found[1] and not found[0][1] and found[2] == (0.0, True)

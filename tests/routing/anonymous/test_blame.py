"""Messages that were changed on their way, and members that cheat: found before anything is unmasked, and
laid at the right door.
"""

import contextlib
import random

import numpy as np
import pytest

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.crypto import digest, shared_secret
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.paths import backup_of
from fedspeed.routing.anonymous.phases import AttemptFailed
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.anonymous.recovery import members_to_exclude
from tests.routing.anonymous.parties import Parties


class Wire:
    """Changes one message between two members, once."""

    def __init__(self, kind: str, seed: int, members):
        self.kind, self.random, self.members, self.edge, self.old = (
            kind,
            random.Random(seed),
            members,
            None,
            {},
        )
        self.state = self.random.choice(["hop 0", "hop 1", "hop 2"])

    def __call__(self, state, messages):
        if state != self.state or self.edge:
            return
        level = int(state[-1])
        plan = self.members[0].plan
        size = cells.size(plan, level)
        each = (
            1 if level == 0 else len(self.members)
        )  # cells that go together: to swap two of these changes nothing
        least = {"replay": 2, "swap": each + 1}.get(self.kind, 1)
        full = [pair for pair, text in messages.items() if pair[0] != pair[1] and len(text) >= size * least]
        if not full:
            return
        sender, receiver = self.random.choice(full)
        text = bytearray(messages[sender, receiver])
        places = range(0, len(text), size)
        at = self.random.choice(places)
        if self.kind == "tamper":
            text[at + self.random.randrange(size)] ^= 1 << self.random.randrange(8)
        elif self.kind == "drop":  # its place is filled with noise, as a missing cell would show
            text[at : at + size] = self.random.randbytes(size)
        elif self.kind == "replay":
            other = self.random.choice([p for p in places if p != at])
            text[at : at + size] = text[other : other + size]
        elif self.kind == "swap":
            other = self.random.choice([p for p in places if p // size // each != at // size // each])
            text[at : at + size], text[other : other + size] = (
                text[other : other + size],
                text[at : at + size],
            )
        messages[sender, receiver] = bytes(text)
        self.edge = frozenset({sender, receiver})


@pytest.mark.parametrize(
    "seeds", [range(75), pytest.param(range(75, 300), marks=pytest.mark.slow)]
)  # over a thousand cases with the slow ones
@pytest.mark.parametrize("kind", ["tamper", "drop", "replay", "swap"])
def test_what_is_changed_on_the_way_is_found_and_its_edge_named(kind, seeds):
    done = 0
    for seed in seeds:
        parties = Parties(3 + seed % 3, 80 + seed % 50, seed, chunk_length=8)
        members = parties.attempt()
        wire = Wire(kind, seed, members)
        told: list[str] = []
        ends = play(members, lambda state, messages: (wire(state, messages), told.append(state))).results
        if not wire.edge:
            continue
        done += 1
        assert all(isinstance(end, AttemptFailed) and not end.fatal for end in ends), (
            f"seed {seed}: not noticed"
        )
        assert "unmask" not in told
        assert all(end.blamed == (wire.edge,) for end in ends), (
            f"seed {seed}: {wire.edge} was it, {ends[0].blamed} named"
        )
    assert done > 0.6 * len(seeds)


@pytest.mark.parametrize("told", [{0, 2}, {0, 1}, {3}])
def test_one_that_complains_to_some_only_keeps_all_from_committing(told):
    def complain(now, messages):
        if now == "vote":
            for i in told:
                messages[4, i] = messages[4, i][:-4] + (0).to_bytes(4, "big")

    ends = play(Parties(5).attempt(), complain).results
    assert all(isinstance(end, AttemptFailed) and not end.fatal and not end.lost for end in ends), ends


def test_one_that_tells_some_of_other_lists_keeps_all_from_committing():
    def change(now, messages):
        if now == "vote":
            messages[4, 2] = bytes(32) + messages[4, 2][32:]

    ends = play(Parties(5).attempt(), change).results
    assert all(isinstance(end, AttemptFailed) and not end.lost for end in ends), ends
    assert [end.blamed for end in ends] == [(), (), (frozenset({2, 4}),), (), ()]


@pytest.mark.parametrize("state", ["announce", "hop 0", "collect", "confirm"])
def test_a_truncated_message_is_as_good_as_none(state):
    """Nobody can tell whether member 2 sent too little or member 0 says so: both are left out, and neither is
    blamed.
    """
    parties = Parties(6)

    def cut(now, messages):
        if now == state:
            messages[2, 0] = messages[2, 0][:-1]

    ends = play(parties.attempt(), cut).results
    assert isinstance(ends[0], AttemptFailed) and isinstance(ends[2], AttemptFailed)
    for i in (1, 3, 4, 5):
        if state == "confirm":  # they have its signature
            assert np.array_equal(ends[i].values, parties.sum())
        else:
            assert (
                isinstance(ends[i], AttemptFailed)
                and ends[i].lost == frozenset({0, 2})
                and not ends[i].blamed
            )


def test_colluders_cannot_have_the_others_left_out():
    """Members 0 and 1 say that 3 and 4 are lost, who answer everybody: the claim costs whoever makes it as
    much.
    """
    assert members_to_exclude({
        0: frozenset({3, 4}),
        1: frozenset({3, 4}),
        2: frozenset(),
        3: frozenset(),
        4: frozenset(),
    }) == {0, 1, 3, 4}
    assert members_to_exclude({
        0: frozenset({3}),
        1: frozenset({3}),
        2: frozenset({3}),
        3: frozenset(),
        4: frozenset(),
    }) == {3}
    assert members_to_exclude({
        0: frozenset({3}),
        1: frozenset(),
        2: frozenset(),
        3: frozenset({0}),
        4: frozenset(),
    }) == {0, 3}


def test_an_owner_cannot_have_a_member_blamed_by_a_list_that_it_did_not_sign():
    parties = Parties(5)

    def change(now, messages):
        if now == "collect":
            messages[0, 3] = messages[0, 3][:-1] + bytes([messages[0, 3][-1] ^ 1])  # of the signature

    ends = play(parties.attempt(), change).results
    assert all(isinstance(end, AttemptFailed) and end.blamed == (frozenset({0, 3}),) for end in ends)


class TwinSource(Member):
    """Uses serials that another one knows too."""

    def build_cell(self, chunk, cell):
        self.cells_sent[chunk].serial = digest(self.context, bytes([chunk]))[: cells.SERIAL]
        super().build_cell(chunk, cell)


def test_sources_that_share_a_serial_are_blamed_and_not_the_owner():
    parties = Parties(5, kinds={0: TwinSource, 1: TwinSource})
    ends = play(parties.attempt()).results
    assert all(isinstance(end, AttemptFailed) and end.blamed == (frozenset({0, 1}),) for end in ends)


@pytest.mark.parametrize("at", [0, 32])
def test_a_key_that_agrees_on_nothing_is_its_members_fault(at):
    class Small(Member):
        def _announce(self):
            steps = super()._announce()
            swap = next(steps)
            body = bytearray(swap.parts[0][:-64])
            body[at : at + 32] = bytes(32)
            message = bytes(body) + self._identity.sign(digest(b"announce", self.context, bytes(body)))
            swap.parts = [message] * self.n
            with contextlib.suppress(StopIteration):
                steps.send((yield swap))

    ends = play(Parties(4, kinds={2: Small}).attempt()).results
    assert all(
        isinstance(end, AttemptFailed) and end.blamed == (frozenset({2}),)
        for i, end in enumerate(ends)
        if i != 2
    )


# Members that cheat and stand by it.


class FlippingRelay(Member):
    def shuffled(self, level, chunk, room):
        out = super().shuffled(level, chunk, room)
        if chunk == min(self.received[level]) and level == 0:
            out[0][0] ^= 1
        return out


class DoublingRelay(Member):
    """Sends one member's cell in place of another's: who is missing must be found out."""

    def shuffled(self, level, chunk, room):
        out = super().shuffled(level, chunk, room)
        return [out[0], out[0], *out[2:]] if chunk == min(self.received[level]) and level == 0 else out


class BadSource(Member):
    """Seals rubbish for the second station."""

    def build_cell(self, chunk, cell):
        super().build_cell(chunk, cell)
        if chunk != 1:
            return
        station = self.plan.paths[chunk][0]
        key = self.onion_keys[station]
        private = self.cells_sent[chunk].ephemeral[0]
        inside = b"\7" * (cells.size(self.plan, 0) - cells.LAYER)
        from fedspeed.routing.anonymous.crypto import public_bytes, seal

        public = public_bytes(private)
        sealed = seal(
            self.cipher,
            cells._layer_key(shared_secret(private, key), self.context, 0, chunk, public),
            inside,
            self.context,
        )
        cell[:] = np.frombuffer(public + sealed, np.uint8)


class LyingOwner(Member):
    """Lists a cell that nobody has sent."""

    def _sum_chunk(self, chunk, cores):
        text = super()._sum_chunk(chunk, cores)
        return b"\0" * cells.SERIAL + text[cells.SERIAL :]


class ForgingOwner(Member):
    """Adds to a sum. The serials are right."""

    def _sum_chunk(self, chunk, cores):
        text = super()._sum_chunk(chunk, cores)
        self.sums[chunk] += np.uint32(1)  # in the memory that the backup is given too
        return text[:-32] + digest(self.sums[chunk].tobytes())


class Slanderer(Member):
    """Complains about what was right."""

    def _vote(self):
        self.complaints.add(
            next(c for c in range(self.plan.chunks) if backup_of(self.plan.owner(c), self.n) != self.me)
        )
        return super()._vote()


@pytest.mark.parametrize("kind", [FlippingRelay, DoublingRelay, BadSource, LyingOwner, Slanderer])
@pytest.mark.parametrize("guilty", range(4))
def test_one_that_cheats_is_named_alone(kind, guilty):
    parties = Parties(4, kinds={guilty: kind})
    ends = play(parties.attempt()).results
    assert all(isinstance(end, AttemptFailed) and end.blamed == (frozenset({guilty}),) for end in ends), [
        getattr(e, "blamed", e) for e in ends
    ]


def test_a_sum_that_was_forged_does_not_pass_the_check():
    """The owner adds to its sums before it lists them, so that all digests agree."""
    parties = Parties(4, kinds={2: ForgingOwner})
    ends = play(parties.attempt()).results
    assert all(isinstance(end, AttemptFailed) and "not those of what was sent" in str(end) for end in ends)


class TwoFaced(Member):
    def _collect(self):
        steps = super()._collect()
        swap = next(steps)
        from fedspeed.routing.anonymous.crypto import SIGNATURE, digest

        entry = self.n * cells.SERIAL + 32
        width = len(self.plan.owned(self.me)) * entry
        other = (self.me + 2) % self.n
        text = swap.parts[other][: width - 1] + b"?"
        swap.parts[other] = (
            text
            + self._identity.sign(digest(b"collect", self.context, text))
            + swap.parts[other][width + SIGNATURE :]
        )
        came = yield swap
        try:
            steps.send(came)
        except StopIteration:
            return


class LateChooser(Member):
    """Reveals another contribution to the beacon than it had committed to: it could choose the paths so."""

    def _reveal(self):
        self._contribution = bytes(32)
        return super()._reveal()


class Pretender(Member):
    """Tells another secret of its own mask than the one it used."""

    def _unmask(self):
        self._self_secret = b"\1" * 32
        return super()._unmask()


def test_a_part_of_the_beacon_must_be_the_promised_one():
    for i, end in enumerate(play(Parties(4, kinds={1: LateChooser}).attempt()).results):
        assert isinstance(end, AttemptFailed) and end.blamed == (frozenset({1}),)
        assert i == 1 or "another contribution to the beacon" in str(end)


def test_one_that_tells_a_wrong_secret_is_done_without():
    """Its update is settled; what it keeps to itself the others rebuild from its shares."""
    parties = Parties(4, kinds={1: Pretender})
    ends = play(parties.attempt()).results
    assert all(np.array_equal(ends[i].values, parties.sum()) for i in (0, 2, 3))


@pytest.mark.parametrize("state", ["announce", "reveal"])
def test_what_only_one_member_has_seen_ends_the_attempt_for_all(state):
    """Else the one that left would be taken for lost."""

    def spoil(now, messages):
        if now == state:
            messages[1, 2] = messages[1, 2][:-1] + bytes([messages[1, 2][-1] ^ 1])

    for end in play(Parties(5).attempt(), spoil).results:
        assert (
            isinstance(end, AttemptFailed)
            and end.blamed == (frozenset({1, 2}),)
            and not end.lost
            and not end.fatal
        )


class ForgetfulOwner(Member):
    """Gives its backup other sums than it has listed."""

    def _collect(self):
        steps = super()._collect()
        swap = next(steps)
        heir = backup_of(self.me, self.n)
        swap.parts[heir][-1] ^= 1
        came = yield swap
        try:
            steps.send(came)
        except StopIteration:
            return


def test_a_backup_that_could_not_stand_in_is_noticed_before_it_must():
    for end in play(Parties(4, kinds={2: ForgetfulOwner}).attempt()).results:
        assert isinstance(end, AttemptFailed) and end.blamed == (frozenset({2, 3}),)


def test_different_lists_for_different_members_are_noticed():
    parties = Parties(4, kinds={1: TwoFaced})
    ends = play(parties.attempt()).results
    assert all(isinstance(end, AttemptFailed) for end in ends) and all(
        1 in group for end in ends for group in end.blamed
    )
    assert any("different lists" in str(end) for end in ends)


def test_another_roster_or_other_settings_are_refused_at_the_first_message():
    parties = Parties(3)
    one = parties.attempt()
    other = parties.attempt(settings=b"another base model")
    ends = play([one[0], one[1], other[2]]).results
    assert "member 2 announced itself with other settings" in str(ends[0]) and ends[0].blamed == (
        frozenset({2}),
    )
    old = parties.attempt(number=7)
    ends = play([one[0], one[1], old[2]]).results
    assert all(isinstance(end, AttemptFailed) for end in ends), "an announcement of another attempt"

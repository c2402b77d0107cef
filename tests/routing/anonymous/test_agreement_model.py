"""All that one liar can do to the agreement of an attempt: explored in a model, which is compared with the
real members.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedspeed.routing.anonymous.announcement import BODY, commit_to_secret
from fedspeed.routing.anonymous.crypto import DIGEST, KEY, SIGNATURE, digest
from fedspeed.routing.anonymous.lists import entry_size
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.phases import AgreedSum
from fedspeed.routing.anonymous.recovery import RecoveryMessage, pack_members
from fedspeed.routing.anonymous.statements import LABELS, RECORD, statement
from tests.routing.anonymous.agreement_model import Failure, Rules, Sum
from tests.routing.anonymous.agreement_search import explore, play_one
from tests.routing.anonymous.cheats import resigned
from tests.routing.anonymous.parties import Parties

THREE = Rules()
FOUR = Rules(n=4, threshold=3, recoveries=8)
MESSAGES = frozenset({"right", "other", "nothing", "no certificate"})
CLAIMS = MESSAGES | {"lost 0", "lost 1"}
PHASES = MESSAGES | {"recovering"}


# The exploration.


@pytest.mark.parametrize(
    ("rules", "only"),
    [
        (THREE, MESSAGES),
        (replace(THREE, recoveries=2), CLAIMS),
        (replace(THREE, recoveries=2), PHASES),
        pytest.param(replace(THREE, recoveries=2), CLAIMS | PHASES, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("checkers", [frozenset(), {0}])
def test_three_members_agree_whatever_one_of_them_sends(rules, only, checkers):
    """In each phase each honest member gets the right message, another one that is signed, or none."""
    found = explore(replace(rules, checkers=frozenset(checkers)), only=only)
    assert not found.violation, found.violation
    assert {type(s.end) for world in found.ends for s in world} == {Sum, Failure}


@pytest.mark.parametrize(
    ("rules", "deviations"),
    [
        (THREE, 3),
        (FOUR, 2),
        (replace(FOUR, crashes=1), 2),
        pytest.param(THREE, 4, marks=pytest.mark.slow),
        pytest.param(FOUR, 3, marks=pytest.mark.slow),
    ],
)
def test_members_agree_whatever_a_few_messages_say(rules, deviations):
    """All kinds of messages, of which a few deviate; a crash of an honest member counts as one."""
    found = explore(rules, deviations)
    assert not found.violation, found.violation


@pytest.mark.parametrize(
    ("change", "deviations", "violated"),
    [
        ({"compares": False}, 4, "no honest member is named alone"),
        ({"returns": False}, 4, "all try again with the same members"),
        ({"stays": False}, 3, "all try again with the same members"),
        ({"signs_once": False, "stays": False}, 3, "all that finish have the same sum"),
        ({"needs_all": False}, 2, "no secret leaves without a certificate"),
        ({"ignores_self": False}, 40, "every attempt ends"),
        ({"marks": False}, 4, "no update is in sums over two sets"),
        ({"pairs": False}, 2, "no honest member is named alone"),
    ],
)
def test_the_exploration_would_see_it(change, deviations, violated):
    """Members with a rule less, and what the liar does to them then."""
    # Without phases of its own, where these would be seen first.
    only = frozenset({"right", "other", "unsigned"}) if "signs_once" in change else None
    found = explore(replace(THREE, **change), deviations, only)
    assert found.violation and found.violation.what == violated, found.violation


# The model beside the real members.

LIAR = 2
HONEST = (0, 1)
NAMES = {
    "announce": ("other", "unsigned"),
    "reveal": ("other", "unsigned", "uncommitted"),
    "collect": ("other", "unsigned", "spoiled"),
    "confirm": ("other", "unsigned", "complaint"),
    "unmask": ("other", "unsigned"),
    "sums": ("other",),
    "challenge": ("other",),
    "done": ("other", "unsigned"),
}
ANSWERS = ("no certificate", "complaint", "itself", "proof", "lost 0", "lost 1", "accused 0", "accused 1")
# After the first deviation, what else is deviated from.
LATER = {
    "recover": ANSWERS,
    "blame": ("compared",),
    "void": ("other",),
    "secrets": ("other",),
    "masked": ("other",),
    "redone": ("accused 0", "accused 1"),
}
FIRST = (("confirm", 0, "complaint"), ("confirm", 1, "recovering"), ("unmask", 0, "recovering"))


def flipped(message: bytes, place: int) -> bytes:
    """Return a message with a changed byte."""
    changed = bytearray(message)
    changed[place] ^= 1
    return bytes(changed)


def deviating(name: str, phase: str, receiver: int, message: bytes, liar) -> bytes | None:
    """Return a real message of the liar as the model names it."""
    if name == "nothing":
        return b""
    if name == "recovering":
        return None
    if phase == "recover":
        return _answer(name, message, liar)
    if phase == "redone":
        return pack_members(frozenset({int(name[-1])}))
    if phase == "secrets":
        return message[: LIAR * KEY] + bytes(KEY) + message[(LIAR + 1) * KEY :]
    if phase == "announce" and name == "other":
        return resigned(liar, "announce", flipped(message[:BODY], -1))
    if phase == "reveal" and name == "other":
        echo = digest(b"?")
        return message[:KEY] + echo + _signature(liar, "reveal", echo)
    if phase == "reveal" and name == "uncommitted":
        return bytes(KEY) + message[KEY:]
    if phase == "collect":
        text = message[: len(liar.plan.owned(LIAR)) * entry_size(3)]
        rest = message[len(text) + SIGNATURE :]
        if name == "unsigned":
            return flipped(message, len(text))
        return resigned(liar, "collect", flipped(text, -1 if name == "other" else 0)) + rest
    if phase == "confirm" and name == "other":
        return flipped(message, 0)
    if phase == "confirm" and name == "complaint":
        return message[:DIGEST] + bytes(SIGNATURE)
    if phase == "unmask" and name == "other":
        secret = b"?" * KEY
        return secret + _signature(liar, "unmask", commit_to_secret(secret))
    if phase == "done" and name == "other":
        content = digest(b"?")
        return content + _signature(liar, "done", content)
    return flipped(message, 0 if name in ("other", "compared") else -1)


def _signature(liar, label: str, content: bytes) -> bytes:
    return liar._identity.sign(statement(label, liar.statements._contexts[label], content))


def _answer(name: str, message: bytes, liar) -> bytes:
    answer = RecoveryMessage.unpack(message, 3)
    if name == "no certificate":
        answer = replace(answer, certificate=None)
    elif name == "complaint":
        answer = replace(answer, complaint=0)
    elif name == "itself":
        answer = replace(answer, lost=answer.lost | {LIAR})
    elif name == "proof":
        place = (2 * (LABELS.index("announce") * 3 + LIAR) + 1) * RECORD
        record = digest(b"?") + _signature(liar, "announce", digest(b"?"))
        table = answer.statements
        answer = replace(answer, statements=table[:place] + record + table[place + RECORD :])
    elif name.startswith("lost"):
        answer = replace(answer, lost=answer.lost ^ {int(name[-1])})
    else:
        answer = replace(answer, accused=frozenset({int(name[-1])}))
    return answer.pack(3)


def real_ends(deviations: dict[tuple[str, int], str]) -> tuple[list[Sum | Failure], list[str]]:
    """Return how the real honest members end, in the words of the model, and the phases."""
    parties = Parties(3, relays=0)
    members = parties.attempt()
    left = dict(deviations)

    def change(phase, messages):
        if len(messages) < 9:
            return  # the others are still on their way to the recovery
        for i in HONEST:
            if name := left.pop((phase, i), None):
                messages[LIAR, i] = deviating(name, phase, i, messages[LIAR, i], members[LIAR])

    played = play(members, change)
    ends: list[Sum | Failure] = []
    for result in (played.results[i] for i in HONEST):
        if isinstance(result, AgreedSum):
            value = int(not np.array_equal(result.values, parties.sum()))
            ends.append(Sum(value, result.lost, result.blamed, result.convicted))
        else:
            ends.append(Failure(result.lost, result.blamed, result.fatal, result.settled))
    return ends, played.phases


def without_transcripts(end: Sum | Failure) -> Sum | Failure:
    """Return an end without who is blamed by transcripts, which the model does not have."""
    return end._replace(blamed=())


SINGLE = [
    {(phase, receiver): name}
    for phase, names in NAMES.items()
    for receiver in HONEST
    for name in (*names, "nothing", "recovering")
]
DOUBLE = [
    {first[:2]: first[2], (phase, receiver): name}
    for first in FIRST
    for phase, names in LATER.items()
    for receiver in HONEST
    for name in (*names, "nothing", *(["recovering"] if phase != "recover" else []))
    if name[-1] != str(receiver)
]


@pytest.mark.parametrize("runs", [SINGLE, pytest.param(DOUBLE, marks=pytest.mark.slow), DOUBLE[::7]])
def test_the_real_members_end_as_the_model_says(runs):
    """One message of the liar deviates, or another one after it."""
    differing = {}
    for deviations in runs:
        real, phases = real_ends(deviations)
        expected = [s.end for s in play_one(replace(THREE, checkers=frozenset({0})), deviations)[:LIAR]]
        if "blame" in phases:
            real = list(map(without_transcripts, real))
            expected = list(map(without_transcripts, expected))
        if real != expected:
            differing[str(deviations)] = (real, expected)
    assert not differing, "\n".join(f"{run}: {ends}" for run, ends in differing.items())

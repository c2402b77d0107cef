"""Members that lie at random: their messages are changed on their way out, and signed again."""

import random
from dataclasses import dataclass

import numpy as np

from fedspeed.routing.anonymous.announcement import BODY, commit_to_secret
from fedspeed.routing.anonymous.attempts import PHASES
from fedspeed.routing.anonymous.crypto import DIGEST, KEY, SIGNATURE, digest
from fedspeed.routing.anonymous.recovery import MEMBER_SET, RecoveryMessage, unpack_members
from fedspeed.routing.anonymous.statements import _KEPT, LABELS, RECORD, packed_size, statement
from fedspeed.routing.transports.frames import Frame

KINDS = ("equivocate", "withhold", "corrupt", "replay", "delay", "recover")


@dataclass(frozen=True)
class Lie:
    """What a liar does to its messages of one phase.

    Attributes:
        liar: its number. phase: a name of PHASES. kind: a name of KINDS.
        receivers: whose messages are changed. attempts: in which attempts.
        seed: of the changes, which differ by receiver unless `alike`.
    """

    liar: int
    phase: str
    kind: str
    receivers: frozenset[int]
    attempts: frozenset[int]
    seed: int
    alike: bool = True


class Liar:
    """The outgoing messages of a member that lies.

    Args:
        lies: its own.
        member: returns its member in the present attempt.
        identities: private keys of the coalition, by number among the members of the present attempt.
        step_deadline_s: after which honest members take a silent one for lost.
    """

    def __init__(self, lies, member, identities, step_deadline_s):
        self._lies = lies
        self._member = member
        self._identities = identities
        self._step_deadline_s = step_deadline_s
        self._sent = []

    def __call__(self, receiver: int, frame: Frame) -> list[tuple[float, Frame]]:
        """Return what leaves in place of a frame, with seconds of delay."""
        data = np.concatenate(frame.pieces).tobytes()
        attempt, number = frame.step
        leaving = [(0.0, frame)]
        for lie in self._lies:
            if PHASES[number] != lie.phase or attempt not in lie.attempts or receiver not in lie.receivers:
                continue
            choices = random.Random(lie.seed if lie.alike else lie.seed + 7919 * receiver)
            leaving = self._told(lie, choices, frame.step, data)
        self._sent.append((frame.step, data))
        return leaving

    def _told(self, lie, choices, step, data):
        if lie.kind == "withhold":
            return []
        if lie.kind == "delay":
            late_s = choices.choice([0.3, 0.9, 0.999, 1.0, 1.001, 1.1, 2.5]) * self._step_deadline_s
            return [(late_s, _frame(step, data))]
        if lie.kind == "recover":
            recovery = _frame((step[0], 0), self._member()._recovery_message().pack(self._member().n))
            return [(0.0, recovery)] + [(0.0, _frame(step, data))] * choices.choice([0, 1])
        if lie.kind == "replay" and self._sent:
            old_step, old = choices.choice(self._sent)
            return [(0.0, _frame(choices.choice([step, old_step]), old))]
        if lie.kind == "equivocate":
            return [(0.0, _frame(step, self._other(lie.phase, bytearray(data), choices)))]
        changed = bytearray(data)
        changed[choices.randrange(len(changed))] ^= 1 << choices.randrange(8)
        return [(0.0, _frame(step, bytes(changed)))]

    def _sign(self, label: str, content: bytes, number: int | None = None) -> bytes:
        member = self._member()
        context = member.statements._contexts.get(label, member.context)
        identity = self._identities()[member.me if number is None else number]
        return identity.sign(statement(label, context, content))

    def _other(self, phase, data, choices) -> bytes:
        """Return another content of a phase, with a valid signature where it has one."""
        if phase == "announce":
            field = KEY * choices.randrange(BODY // KEY)
            data[field : field + KEY] = choices.randbytes(KEY)
            return bytes(data[:BODY]) + self._sign(phase, digest(bytes(data[:BODY])))
        if phase == "reveal":
            start = choices.choice([0, KEY])
            data[start : start + KEY] = choices.randbytes(KEY)
            echoed = bytes(data[KEY : KEY + DIGEST])
            return bytes(data[: KEY + DIGEST]) + self._sign(phase, echoed)
        if phase == "collect":
            size = len(self._member().plan.owned(self._member().me)) * (self._member().n * 16 + DIGEST)
            data[choices.randrange(size)] ^= 1
            text = bytes(data[:size])
            return text + self._sign(phase, digest(text)) + bytes(data[size + SIGNATURE :])
        if phase in ("confirm", "done"):
            content = choices.randbytes(DIGEST)
            return content + choices.choice([self._sign(phase, content), bytes(SIGNATURE)])
        if phase == "unmask":
            secret = choices.randbytes(KEY)
            return secret + self._sign(phase, commit_to_secret(secret))
        if phase == "recover":
            return self._other_recovery(bytes(data), choices)
        if phase == "redone":
            return choices.randbytes(MEMBER_SET)
        if phase == "secrets":
            start = KEY * choices.randrange(len(data) // KEY)
            data[start : start + KEY] = bytes(KEY)
            return bytes(data)
        if phase.startswith("hop"):
            return choices.randbytes(len(data))
        for _ in range(choices.choice([1, 4])):
            data[choices.randrange(len(data))] ^= 1 << choices.randrange(8)
        return bytes(data)

    def _other_recovery(self, data: bytes, choices) -> bytes:
        """Return another message of the phase `recover`: other claims, accusations and complaints, or a
        signature of the coalition over another content.
        """
        n = self._member().n
        message = RecoveryMessage.unpack(data, n)
        anybody = unpack_members(choices.randbytes(MEMBER_SET), n)
        statements = bytearray(data[len(data) - packed_size(n) :])
        lost = message.lost
        accused = message.accused
        complaint = message.complaint
        what = choices.randrange(4)
        if what == 0:
            lost = anybody
        elif what == 1:
            accused = anybody
        elif what == 2:
            complaint = choices.randrange(n)
        else:
            label = choices.choice(LABELS)
            liar = choices.choice(sorted(self._identities()))
            content = choices.randbytes(DIGEST)
            start = RECORD * (_KEPT * (LABELS.index(label) * n + liar) + choices.randrange(_KEPT))
            statements[start : start + RECORD] = content + self._sign(label, content, liar)
        other = RecoveryMessage(
            lost, accused, complaint=complaint, certificate=message.certificate, statements=bytes(statements)
        )
        return other.pack(n)


def _frame(step, data: bytes) -> Frame:
    return Frame(step, [np.frombuffer(data, np.uint8)])

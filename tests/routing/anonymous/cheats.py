"""Members that deviate from the protocol, for the tests of who is blamed."""

import contextlib

import numpy as np

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.announcement import BODY
from fedspeed.routing.anonymous.crypto import DIGEST, KEY, digest, public_bytes, seal, shared_secret
from fedspeed.routing.anonymous.paths import backup_of
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.anonymous.statements import statement


def after_first_swap(steps, change):
    """Play a phase that has one swap, which `change` may alter before it is sent."""
    swap = next(steps)
    change(swap)
    arrived = yield swap
    with contextlib.suppress(StopIteration):
        steps.send(arrived)


def resigned(member, label, body):
    """Return a body with the member's signature of it, whatever it has signed before."""
    return body + member._identity.sign(statement(label, member.context, digest(body)))


class WeakKeys(Member):
    """Announces a public key of zeros, a point of small order; `start` says which of its two."""

    start = 0

    def _announce(self):
        return after_first_swap(super()._announce(), self._weaken)

    def _weaken(self, swap):
        body = bytearray(swap.parts[0][:BODY])
        body[self.start : self.start + KEY] = bytes(KEY)
        swap.parts = [resigned(self, "announce", bytes(body))] * self.n


class WeakMaskKey(WeakKeys):
    """Announces a mask key of zeros."""

    start = KEY


class LateChooser(Member):
    """Reveals another contribution to the beacon than it has committed to, so that it could steer paths."""

    def _reveal(self):
        self._contribution = bytes(KEY)
        return super()._reveal()


class TwinSource(Member):
    """Uses serials that another member knows too."""

    def build_cell(self, chunk, out):
        self.cells_sent[chunk].serial = digest(self.context, bytes([chunk]))[: cells.SERIAL]
        super().build_cell(chunk, out)


class BadSource(Member):
    """Seals bytes to the first relay that are no cell for the second one."""

    def build_cell(self, chunk, out):
        super().build_cell(chunk, out)
        if chunk != 1:
            return
        private = self.cells_sent[chunk].ephemeral[0]
        secret = shared_secret(private, self.onion_keys[self.plan.paths[chunk][0]])
        public = public_bytes(private)
        key = cells._layer_key(secret, self.context, 0, chunk, public)
        content = b"\7" * (cells.size(self.plan, 0) - cells.LAYER)
        out[:] = np.frombuffer(public + seal(self.cipher, key, content, self.context), np.uint8)


class FlippingRelay(Member):
    """Changes a bit of a cell that it forwards."""

    def shuffled(self, hop, chunk, out):
        forwarded = super().shuffled(hop, chunk, out)
        if hop == 0 and chunk == min(self.received[hop]):
            forwarded[0][0] ^= 1
        return forwarded


class DoublingRelay(Member):
    """Forwards one member's cell twice and another's not at all."""

    def shuffled(self, hop, chunk, out):
        forwarded = super().shuffled(hop, chunk, out)
        if hop == 0 and chunk == min(self.received[hop]):
            return [forwarded[0], forwarded[0], *forwarded[2:]]
        return forwarded


class LyingOwner(Member):
    """Lists a cell that nobody has sent."""

    def _sum_chunk(self, chunk, cores):
        entry = super()._sum_chunk(chunk, cores)
        return b"\0" * cells.SERIAL + entry[cells.SERIAL :]


class ForgingOwner(Member):
    """Adds to a sum before it lists the sum's digest, so that all digests agree; the serials are right."""

    def _sum_chunk(self, chunk, cores):
        entry = super()._sum_chunk(chunk, cores)
        self.sums[chunk] += np.uint32(1)  # in the memory that the backup gets too
        return entry[:-DIGEST] + digest(self.sums[chunk].tobytes())


class EquivocatingOwner(Member):
    """Signs another list for one member than for the rest."""

    def _collect(self):
        return after_first_swap(super()._collect(), self._change)

    def _change(self, swap):
        other = (self.me + 2) % self.n
        width = len(self.plan.owned(self.me)) * (self.n * cells.SERIAL + DIGEST)
        text = swap.parts[other][: width - 1] + b"?"
        signed = resigned(self, "collect", text)
        swap.parts[other] = signed + swap.parts[other][len(signed) :]


class ForgetfulOwner(Member):
    """Sends its backup other sums than it has listed."""

    def _collect(self):
        return after_first_swap(super()._collect(), self._change)

    def _change(self, swap):
        swap.parts[backup_of(self.me, self.n)][-1] ^= 1


class Slanderer(Member):
    """Complains about a chunk that was right."""

    def _confirm(self):
        chunks = range(self.plan.chunks)
        self.complaints.add(next(c for c in chunks if backup_of(self.plan.owner(c), self.n) != self.me))
        return super()._confirm()


class Pretender(Member):
    """Reveals another secret of its self mask than the one it has used."""

    def _unmask(self):
        self._self_secret = b"\1" * KEY
        return super()._unmask()


class FalsifyingOwner(Member):
    """Opens its chunks falsely: sets the sums that it sends to zero.

    Attributes:
        victims: members that it lies to; None: all.
    """

    victims = None

    def _gather_sums(self):
        steps = super()._gather_sums()
        swap = next(steps)
        zeros = np.zeros(len(swap.parts[self.me]), np.uint8)
        swap.parts = [
            zeros if self.victims is None or i in self.victims else part for i, part in enumerate(swap.parts)
        ]
        arrived = yield swap
        try:
            steps.send(arrived)
        except StopIteration as stop:
            return stop.value

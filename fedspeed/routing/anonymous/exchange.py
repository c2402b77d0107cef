"""The anonymous exchange: attempts at a sum over a transport, one after the other until one is agreed upon.

A vector of an update is fixed-point (`ring.encode`), scaled by what is public: the sum of all weights seen so far, and the size of the last sum, block
by block. A float64 vector (counts, losses) is summed exactly. The weight is a word of the masked sum like any other.
"""

import math
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.crypto import CIPHERS, KEY, digest, public_of, stream
from fedspeed.routing.anonymous.protocol import Agreed, Lost, Member, Terms, Void
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.exchange import Exchange
from fedspeed.routing.rooms import ROOMS
from fedspeed.routing.transport import PeersLost, Transport

STATES = ("settle", "announce", "reveal", *(f"hop {level}" for level in range(8)), "collect", "confirm", "testify", "unmask", "sums", "done", "void")
_NOTE = struct.Struct("<d8s")
_MARGIN = 64.0  # times the largest change of a block in the last aggregate may a next one be
_SMALLEST = 1e-3  # a block that hardly moved may move this part of what the others did
_BLOCKS, _BLOCK_WORDS = 256, 256  # most blocks, and least words of one, that have a span of their own


@dataclass(frozen=True)
class Mode:
    """masked: words are masked. mixed: cells go through relays."""

    masked: bool
    mixed: bool


MODES = {"mix": Mode(False, True), "mask": Mode(True, False), "mix+mask": Mode(True, True)}


class AnonymousExchange(Exchange):
    """Args:
        rules: what all participants must have in common.
        identity: this participant's key. roster: everyone's public keys, in the order of the transport's numbers.
        settings: digest of what must be equal on all sites.

    Raises:
        FedSpeedError: too few participants.
    """

    def __init__(self, transport: Transport, rules: RoutingConfig, identity: Ed25519PrivateKey, roster: Sequence[bytes], settings: bytes,
                 roll=None):
        if transport.size < rules.min_participants:
            raise FedSpeedError(f"routing.mode={rules.mode} with {transport.size} participants: a sum of fewer than {rules.min_participants} says too much "
                                "about each; set routing.mode=plain inside one trust domain, or "
                                f"routing.min_participants={transport.size} if you know what it means")
        self._rules, self._identity, self._roster, self._settings = rules, identity, tuple(roster), settings
        self._present = list(range(transport.size))
        self._spans: np.ndarray | None = None  # by block, after the last aggregate
        self._whole = 0.0  # the largest sum of weights so far
        self._count = 0  # attempts so far
        self.cut = 0  # words of the last sum that were beyond the span
        super().__init__(transport, rules.deadline_s, roll)

    def close(self) -> None:
        super().close()
        ROOMS.clear()

    def _run(self, tag: int, vector: np.ndarray, weight: float):
        begin = time.perf_counter()
        self._arrived = None
        if vector.dtype == np.float64:
            words = ring.encode_exact(np.append(vector, weight))
            agreed = self._agree(tag, len(words), lambda notes: words)
            total = ring.decode_exact(agreed.words)
            return total[:-1], float(total[-1]), self._arrived - begin, time.perf_counter() - self._arrived
        total, weights = self._fixed(tag, vector, weight)
        return total, weights, self._arrived - begin, time.perf_counter() - self._arrived

    def _fixed(self, tag: int, vector: np.ndarray, weight: float) -> tuple[np.ndarray, float]:
        """(sum, sum of weights). Where the weights are more than anybody knew, nothing is said before all know."""
        n = len(vector)
        while True:
            agreed = self._agree(tag, n + 2 * ring.LIMBS, lambda notes: self._words(notes, vector, weight))
            weights, cut = ring.decode_exact(agreed.words[n:])
            spans, whole = self._scale(agreed.notes, n)
            if weights <= whole or weights == 0:
                break
            self._whole = 2 * weights
        total = ROOMS.take(n, dtype=np.float32)
        largest = np.array([ring.decode(agreed.words[at], span * whole, total[at]) for at, span in zip(_blocks(n), spans)])
        self._whole, self.cut = whole, int(cut)
        if weights:
            largest /= weights
            self._spans = np.maximum(_MARGIN * np.maximum(largest, _SMALLEST * largest.max()), 4 * spans if cut else 0.0)
            if not largest.any():
                self._spans = spans
        return total, float(weights)

    def _words(self, notes: Sequence[bytes], vector: np.ndarray, weight: float) -> np.ndarray:
        n = len(vector)
        spans, whole = self._scale(notes, n)
        words, cut = ROOMS.take(n + 2 * ring.LIMBS, dtype=np.uint32), 0
        if not whole:
            words[:] = 0
        else:
            random = _random(CIPHERS[self._rules.cipher])
            for at, span in zip(_blocks(n), spans):
                cut += ring.encode(vector[at], span * whole, random, words[at], min(1.0, weight / whole))
        words[n:] = ring.encode_exact(np.array([weight, cut]))
        return words

    def _note(self) -> bytes:
        return _NOTE.pack(self._whole, b"" if self._spans is None else digest(self._spans.tobytes())[:8])

    def _scale(self, notes: Sequence[bytes], n: int) -> tuple[np.ndarray, float]:
        """(span of an update's value in each block, sum of weights) that all compute with. Spans are those of the last aggregate if all saw it."""
        known = [_NOTE.unpack(note) for note in notes]
        if not all(math.isfinite(whole) and whole >= 0 for whole, _ in known):
            raise Void("a participant announced a scale that is none", fatal=True)
        blocks = len(_blocks(n))
        alike = len({mark for _, mark in known}) == 1 and self._spans is not None and len(self._spans) == blocks
        return self._spans if alike else np.full(blocks, self._rules.first_span), max(whole for whole, _ in known)

    # Attempts.

    def _agree(self, tag: int, words: int, payload) -> Agreed:
        reasons: list[str] = []
        for attempt in range(self._rules.attempts):
            threshold = len(self._roster) // 2 + 1
            needed = max(threshold, self._rules.min_participants)
            if len(self._present) < needed:
                raise LostPeerError(f"{len(self._present)} of {len(self._roster)} participants are left, fewer than the {needed} that a sum needs "
                                    f"({'; '.join(reasons)}); the same command goes on from the journal")
            self._count += 1
            try:
                return self._attempt(words, payload, threshold)
            except Void as void:
                reasons.append(self._told(void))
                if void.fatal:
                    break
                alone = {next(iter(group)) for group in void.blamed if len(group) == 1}
                gone = [self._present[i] for i in (void.lost | alone)]
                if self._transport.rank in gone:
                    raise FedSpeedError(f"the others have convicted this participant of spoiling the exchange: {void}") from void
                self._present = [p for p in self._present if p not in gone]
                print(f"fedspeed: exchange {tag}: {reasons[-1]}; once more with fresh masks", file=sys.stderr)
        raise LostPeerError(f"the exchange failed: {'; '.join(reasons)}; the same command goes on from the journal")

    def _told(self, void: Void) -> str:
        """The reason, with the participants' own numbers in place of those of the attempt."""
        gone = f" (lost: {', '.join(str(self._present[i]) for i in sorted(void.lost))})" if void.lost else ""
        blamed = " or ".join("/".join(str(self._present[i]) for i in sorted(group)) for group in void.blamed)
        return f"{void}{gone}" + (f" (participants {blamed})" if blamed and self._present != list(range(len(self._roster))) else "")

    def _attempt(self, words: int, payload, threshold: int) -> Agreed:
        mode, n = MODES[self._rules.mode], len(self._present)
        terms = Terms(tuple(self._roster[p] for p in self._present), words, self._settings, self._count, mode.masked,
                      min(self._rules.relays, n - 1) if mode.mixed else 0, self._rules.cell_kib * 256, self._rules.cipher, threshold)
        member = Member(terms, self._present.index(self._transport.rank), self._identity, payload, self._note())
        steps = member.run()
        swap = next(steps)
        while True:
            parts, sizes = [b""] * self._transport.size, [0] * self._transport.size
            for i, p in enumerate(self._present):
                parts[p], sizes[p] = swap.parts[i], swap.sizes[i]
            patience = self._deadline_s if swap.state == "announce" else self._rules.step_deadline_s
            try:
                came = self._transport.swap(parts, sizes, patience, (self._count, STATES.index(swap.state)))
                if self._arrived is None:
                    self._arrived = time.perf_counter()
                swap = steps.send([came[p] for p in self._present])
            except PeersLost as lost:
                swap = steps.throw(Lost(frozenset(self._present.index(p) for p in lost.peers), lost.settling))
            except StopIteration as stop:
                return stop.value


def _blocks(n: int) -> list[slice]:
    """Ranges of a vector of n words that have spans of their own."""
    width = max(_BLOCK_WORDS, -(-n // _BLOCKS))
    return [slice(at, min(at + width, n)) for at in range(0, n, width)]


def _random(cipher) -> ring.Stream:
    """Random bits from the system's generator, stretched."""
    import secrets

    key, part = secrets.token_bytes(KEY), iter(range(2**32))
    return lambda out: stream(cipher, key, next(part), out)


def meet(transport: Transport, deadline_s: float, identity: Ed25519PrivateKey) -> list[bytes]:
    """Everyone's public keys, told over the transport itself: for participants of one job, who trust the launcher that started them."""
    own = public_of(identity)
    return [bytes(came) for came in transport.swap([own] * transport.size, [len(own)] * transport.size, deadline_s)]

"""The anonymous exchange: attempts at a sum over a transport, one after the other until one is agreed upon.

A vector of an update is fixed-point (`ring.encode`), scaled by what is public: the sum of all weights, which an exact masked sum has told before, and the
size of the last sum, block by block. A float64 vector (counts, losses) is summed exactly.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.crypto import CIPHERS, KEY, digest, public_of, stream
from fedspeed.routing.anonymous.protocol import NOTE, Agreed, Lost, Member, Terms, Void
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.exchange import Exchange
from fedspeed.routing.rooms import ROOMS
from fedspeed.routing.transport import PeersLost, Transport

STATES = ("settle", "announce", "reveal", *(f"hop {level}" for level in range(8)), "collect", "vote", "confirm", "testify", "unmask", "sums", "done",
          "void")
MARGIN = 64.0  # times the largest change of a block in the last aggregate may a next one be
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
        self._count = 0  # attempts so far
        self.cut = 0  # words of the last sum that were beyond the span
        super().__init__(transport, rules.deadline_s, roll)

    def close(self) -> None:
        super().close()
        ROOMS.clear()

    @property
    def patience_s(self) -> float:
        """No exchange takes longer: all must have begun one, and each state of each attempt has a deadline of its own."""
        return self._deadline_s + 2 * self._rules.attempts * len(STATES) * self._rules.step_deadline_s

    def _run(self, tag: int, vector: np.ndarray, weight: float):
        begin = time.perf_counter()
        self._arrived = None
        if vector.dtype == np.float64:
            total = self._exact(tag, np.append(vector, weight))
            total, weights = total[:-1], float(total[-1])
        else:
            total, weights = self._fixed(tag, vector, weight)
        return total, weights, self._arrived - begin, time.perf_counter() - self._arrived

    def _exact(self, tag: int, values: np.ndarray) -> np.ndarray:
        """Sums of [n] float64, to 2^-48. A word that somebody cannot give (not finite, too large) is not a number in the sum."""
        n, wrong = len(values), ~(np.abs(values) < ring.EXACT_LIMIT)
        words = ring.encode_exact(np.concatenate([np.where(wrong, 0.0, values), wrong]))
        total = ring.decode_exact(self._agree(tag, len(words), lambda notes: words).words)
        return np.where(total[n:] > 0.5, np.nan, total[:n])

    def _fixed(self, tag: int, vector: np.ndarray, weight: float) -> tuple[np.ndarray, float]:
        """(sum, sum of weights). The weights are summed before, and updates once only: two sums of them over different members would tell the difference."""
        n, whole = len(vector), float(self._exact(tag, np.array([weight]))[0])
        if not 0 <= whole < math.inf:
            raise FedSpeedError(f"exchange {tag}: the weights of all participants sum to {whole}: somebody gives one that is none")
        agreed = self._agree(tag, n + 2 * ring.LIMBS, lambda notes: self._words(notes, vector, weight, whole))
        weights, cut = ring.decode_exact(agreed.words[n:])
        if not 0 <= weights <= whole:
            raise FedSpeedError(f"exchange {tag}: weights sum to {weights} beside the updates and to {whole} before: somebody gives two")
        spans, total = self._scale(agreed.notes, n), ROOMS.take(n, dtype=np.float32)
        largest = np.array([ring.decode(agreed.words[at], span * whole, total[at]) for at, span in zip(_blocks(n), spans)])
        self.cut = int(cut)
        if self.cut and self._transport.rank == self._present[0]:
            print(f"fedspeed: exchange {tag}: {self.cut} of all participants' {n * len(agreed.members)} words changed too much, and count for "
                  f"{MARGIN:g} times the largest change of the last round at most (routing.first_span in the first)", file=sys.stderr)
        if weights:
            largest /= weights
            self._spans = np.maximum(MARGIN * np.maximum(largest, _SMALLEST * largest.max()), 4 * spans if cut else 0.0)
            if not largest.any():
                self._spans = spans
        return total, float(weights)

    def _words(self, notes: Sequence[bytes], vector: np.ndarray, weight: float, whole: float) -> np.ndarray:
        n = len(vector)
        words, cut = ROOMS.take(n + 2 * ring.LIMBS, dtype=np.uint32), 0
        if not whole:
            words[:] = 0
        else:
            random = _random(CIPHERS[self._rules.cipher])
            for at, span in zip(_blocks(n), self._scale(notes, n)):
                cut += ring.encode(vector[at], span * whole, random, words[at], min(1.0, weight / whole))
        words[n:] = ring.encode_exact(np.array([weight, cut]))
        return words

    def _note(self) -> bytes:
        return bytes(NOTE) if self._spans is None else digest(self._spans.tobytes())[:NOTE]

    def _scale(self, notes: Sequence[bytes], n: int) -> np.ndarray:
        """Span of an update's value in each block, by which all compute: that of the last aggregate if all saw it."""
        blocks = len(_blocks(n))
        alike = len(set(notes)) == 1 and self._spans is not None and len(self._spans) == blocks
        return self._spans if alike else np.full(blocks, self._rules.first_span)

    # Attempts.

    def _agree(self, tag: int, words: int, payload) -> Agreed:
        reasons: list[str] = []
        self._begun = self._arrived is not None  # all have: nobody is at another exchange, or training
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
            lost, patience = None, self._deadline_s if swap.state == "announce" and not self._begun else self._rules.step_deadline_s
            try:
                came = self._transport.swap(parts, sizes, patience, (self._count, STATES.index(swap.state)))
                if self._arrived is None:
                    self._arrived = time.perf_counter()
                self._begun = True
            except PeersLost as error:
                lost = Lost(frozenset(self._present.index(p) for p in error.peers), error.settling)
            try:
                swap = steps.throw(lost) if lost else steps.send([came[p] for p in self._present])
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

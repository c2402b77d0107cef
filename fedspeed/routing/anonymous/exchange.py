"""The anonymous exchange: attempts at a sum over a transport, one after the other until one is agreed upon.

A vector of an update is fixed-point (`ring.encode`), with a span for each block that an exact masked sum has
told before (`spans`). A float64 vector (counts, losses) is summed exactly.
"""

import math
import time
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.log import LOG
from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.bounds import LARGEST, blocks_of, norm_bounds
from fedspeed.routing.anonymous.crypto import CIPHERS, KEY, fill_key_stream, public_bytes
from fedspeed.routing.anonymous.parameters import Agreed, Lost, PublicParameters, Void
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.config import MODES, RoutingConfig
from fedspeed.routing.exchange import Exchange, Outcome
from fedspeed.routing.transport import PeersLost, Transport

STATES = (
    "settle",
    "announce",
    "reveal",
    *(f"hop {level}" for level in range(8)),
    "collect",
    "vote",
    "confirm",
    "testify",
    "unmask",
    "sums",
    "done",
    "void",
)


class AnonymousExchange(Exchange):
    """Args:
        rules: what all participants must have in common.
        identity: this participant's key. roster: everyone's public keys, in the order of the transport's
            numbers.
        settings: digest of what must be equal on all sites.

    Raises:
        FedSpeedError: too few participants.
    """

    def __init__(
        self,
        transport: Transport,
        rules: RoutingConfig,
        identity: Ed25519PrivateKey,
        roster: Sequence[bytes],
        settings: bytes,
        *,
        roll=None,
    ):
        if transport.size < rules.min_participants:
            raise FedSpeedError(
                f"routing.mode={rules.mode} with {transport.size} participants: a sum of fewer than "
                f"{rules.min_participants} says too much "
                "about each; set routing.mode=plain inside one trust domain, or "
                f"routing.min_participants={transport.size} if you know what it means"
            )
        self._rules, self._identity, self._roster, self._settings = rules, identity, tuple(roster), settings
        self._present = list(range(transport.size))
        self._count = 0  # attempts so far
        super().__init__(transport, rules.deadline_s, roll)

    def close(self) -> None:
        super().close()
        BUFFERS.clear()

    @property
    def max_wait_s(self) -> float:
        """No exchange takes longer: all must have begun one, and each state of each attempt has a deadline of
        its own.
        """
        return self._deadline_s + 2 * self._rules.attempts * len(STATES) * self._rules.step_deadline_s

    def _run(self, tag: int, vector: np.ndarray, weight: float, parts: tuple[int, ...]) -> Outcome:
        begin = time.perf_counter()
        clipped = 0
        self._arrived = None
        if vector.dtype == np.float64:
            total = self._exact(tag, np.append(vector, weight))
            total, weights = total[:-1], float(total[-1])
        else:
            total, weights, clipped = self._fixed(tag, vector, weight, blocks_of(parts))
        return Outcome(total, weights, self._arrived - begin, time.perf_counter() - self._arrived, clipped)

    def _exact(self, tag: int, values: np.ndarray) -> np.ndarray:
        """Sums of [n] float64, to 2^-48. A word that somebody cannot give (not finite, too large) is not a
        number in the sum.
        """
        n = len(values)
        wrong = ~(np.abs(values) < ring.EXACT_LIMIT)
        words = ring.encode_exact(np.concatenate([np.where(wrong, 0.0, values), wrong]))
        total = ring.decode_exact(self._agree(tag, len(words), lambda: words).words)
        return np.where(total[n:] > 0.5, np.nan, total[:n])

    def _fixed(
        self, tag: int, vector: np.ndarray, weight: float, blocks: list[slice]
    ) -> tuple[np.ndarray, float, int]:
        """(sum, sum of weights, values that were clipped). The sizes of all updates are summed before, and
        updates once only.
        """
        n = len(vector)
        bits = np.empty(len(blocks), np.uint32)
        _random(CIPHERS[self._rules.cipher])(bits)
        spans = self._exact(tag, norm_bounds(vector, blocks, bits))
        if not (np.isfinite(spans).all() and (spans >= 0).all()):
            raise FedSpeedError(
                f"exchange {tag}: the sizes of all participants' updates sum to {_first_wrong(spans)}: an "
                f"update is beyond {LARGEST:.3g}, or "
                "somebody gives a size that is none; lower train.lr, or set train.clip"
            )
        agreed = self._agree(tag, n + 2 * ring.LIMBS, lambda: self._words(vector, weight, blocks, spans))
        weights, clipped = ring.decode_exact(agreed.words[n:])
        if not 0 <= weights < math.inf:
            raise FedSpeedError(
                f"exchange {tag}: the weights of all participants sum to {weights}: somebody gives one that "
                "is none"
            )
        total = BUFFERS.take(n, dtype=np.float32)
        for block, span in zip(blocks, spans):
            ring.decode(agreed.words[block], span, total[block])
        return total, float(weights), max(0, round(clipped))

    def _words(self, vector: np.ndarray, weight: float, blocks: list[slice], spans: np.ndarray) -> np.ndarray:
        n = len(vector)
        words = BUFFERS.take(n + 2 * ring.LIMBS, dtype=np.uint32)
        random = _random(CIPHERS[self._rules.cipher])
        clipped = sum(
            ring.encode(vector[block], span, random, words[block]) for block, span in zip(blocks, spans)
        )
        words[n:] = ring.encode_exact(np.array([weight, clipped]))
        return words

    # Attempts.

    def _agree(self, tag: int, words: int, payload) -> Agreed:
        reasons: list[str] = []
        self._begun = self._arrived is not None  # all have: nobody is at another exchange, or training
        for attempt in range(self._rules.attempts):
            threshold = len(self._roster) // 2 + 1
            needed = max(threshold, self._rules.min_participants)
            if len(self._present) < needed:
                raise LostPeerError(
                    f"{len(self._present)} of {len(self._roster)} participants are left, fewer than the "
                    f"{needed} that a sum needs "
                    f"({'; '.join(reasons)}); the same command goes on from the journal"
                )
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
                    raise FedSpeedError(
                        f"the others have convicted this participant of spoiling the exchange: {void}"
                    ) from void
                self._present = [p for p in self._present if p not in gone]
                LOG.info(f"exchange {tag}: {reasons[-1]}; once more with fresh masks")
        raise LostPeerError(
            f"the exchange failed: {'; '.join(reasons)}; the same command goes on from the journal"
        )

    def _told(self, void: Void) -> str:
        """The reason, with the participants' own numbers in place of those of the attempt."""
        gone = f" (lost: {', '.join(str(self._present[i]) for i in sorted(void.lost))})" if void.lost else ""
        blamed = " or ".join("/".join(str(self._present[i]) for i in sorted(group)) for group in void.blamed)
        return f"{void}{gone}" + (
            f" (participants {blamed})" if blamed and self._present != list(range(len(self._roster))) else ""
        )

    def _attempt(self, words: int, payload, threshold: int) -> Agreed:
        mode = MODES[self._rules.mode]
        n = len(self._present)
        terms = PublicParameters(
            tuple(self._roster[p] for p in self._present),
            words,
            self._settings,
            attempt=self._count,
            masked=mode.masked,
            hops=min(self._rules.relays, n - 1) if mode.mixed else 0,
            chunk_words=self._rules.cell_kib * 256,
            cipher=self._rules.cipher,
            threshold=threshold,
        )
        member = Member(terms, self._present.index(self._transport.rank), self._identity, payload)
        steps = member.run()
        swap = next(steps)
        while True:
            parts = [b""] * self._transport.size
            sizes = [0] * self._transport.size
            for i, p in enumerate(self._present):
                parts[p], sizes[p] = swap.parts[i], swap.sizes[i]
            lost = None
            patience = (
                self._deadline_s
                if swap.state == "announce" and not self._begun
                else self._rules.step_deadline_s
            )
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


def _first_wrong(spans: np.ndarray) -> float:
    return float(spans[~(np.isfinite(spans) & (spans >= 0))][0])


def _random(cipher) -> ring.Stream:
    """Random bits from the system's generator, stretched."""
    import secrets

    key = secrets.token_bytes(KEY)
    part = iter(range(2**32))
    return lambda out: fill_key_stream(cipher, key, next(part), out)


def exchange_public_keys(transport: Transport, deadline_s: float, identity: Ed25519PrivateKey) -> list[bytes]:
    """Everyone's public keys, told over the transport itself: for participants of one job, who trust the
    launcher that started them.
    """
    own = public_bytes(identity)
    return [
        bytes(came)
        for came in transport.swap([own] * transport.size, [len(own)] * transport.size, deadline_s)
    ]

"""The anonymous exchange: attempts at a sum over a transport, one after the other, until one succeeds.

A float32 vector (an update) is summed in fixed-point numbers (`ring.encode`), for which an exact masked sum
has agreed on the bounds before (`bounds`). A float64 vector (counts, losses) is summed exactly.
"""

import math
import secrets
import time
from collections.abc import Callable, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.log import LOG
from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.bounds import MAX_NORM_BOUND, blocks_of, norm_bounds
from fedspeed.routing.anonymous.crypto import CIPHERS, KEY, Cipher, fill_key_stream, public_bytes
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed, MembersLost, Payload, Swap
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.config import MODES, RoutingConfig
from fedspeed.routing.exchange import ArrivalTracker, Exchange, Outcome, SumRequest
from fedspeed.routing.transport import PeersLost, Transport

# The number of a phase on the wire is its place here. 0 is the recovery: transports tell by it that a peer
# waits for the others (`Transport.swap`).
PHASES = (
    "recover",
    "announce",
    "reveal",
    *(f"hop {hop}" for hop in range(8)),
    "collect",
    "vote",
    "confirm",
    "blame",
    "unmask",
    "sums",
    "done",
    "void",
)


class AnonymousExchange(Exchange):
    """An exchange in which nobody learns more than sums, or whose cell is whose, as `config.mode` says.

    Participants have two numbers: that of the transport, and their place among those that are left, by which
    the members of an attempt are numbered.
    """

    def __init__(
        self,
        transport: Transport,
        config: RoutingConfig,
        identity: Ed25519PrivateKey,
        roster: Sequence[bytes],
        settings: bytes,
        *,
        arrivals: ArrivalTracker | None = None,
    ):
        """Start the thread of the exchanges.

        Args:
            config: equal on all participants, as far as it is about attempts.
            identity: this participant's private key.
            roster: public keys of all participants, in the order of the transport's numbers.
            settings: digest of everything that must be equal on all sites.

        Raises:
            FedSpeedError: too few participants.
        """
        if transport.size < config.min_participants:
            raise FedSpeedError(
                f"routing.mode={config.mode} with {transport.size} participants: a sum of fewer than "
                f"{config.min_participants} says too much about each; set routing.mode=plain inside one "
                f"trust domain, or routing.min_participants={transport.size} if you know what it means"
            )
        self._config = config
        self._identity = identity
        self._roster = tuple(roster)
        self._settings = settings
        self._present = list(range(transport.size))  # transport numbers of those that are left
        self._attempts = 0  # so far, over all exchanges
        self._arrived: float | None = None  # when all had arrived at the current exchange
        self._begun = False  # whether all have begun the current sum: none is still training
        super().__init__(transport, config.deadline_s, arrivals)

    def close(self) -> None:
        """Close the transport, and free the memory of exchanges."""
        super().close()
        BUFFERS.clear()

    @property
    def max_wait_s(self) -> float:
        """Seconds that no exchange exceeds: all must have begun it, and each phase of each attempt has a
        deadline of its own.
        """
        return self._deadline_s + 2 * self._config.attempts * len(PHASES) * self._config.step_deadline_s

    def bounds_of(self, vector: np.ndarray, tensor_lengths: Sequence[int]) -> np.ndarray:
        blocks = blocks_of(tensor_lengths)
        random_bits = np.empty(len(blocks), np.uint32)
        _random(CIPHERS[self._config.cipher])(random_bits)
        return norm_bounds(vector, blocks, random_bits)

    def _run(self, request: SumRequest) -> Outcome:
        begin = time.perf_counter()
        clipped = 0
        self._arrived = None
        if request.vector.dtype == np.float64:
            sums = self._sum_exactly(request.number, np.append(request.vector, request.weight))
            total = sums[:-1]
            total_weight = float(sums[-1])
        else:
            total, total_weight, clipped = self._sum_update(request)
        assert self._arrived is not None, "an attempt that gives a sum has heard everybody"
        return Outcome(
            total=total,
            weight=total_weight,
            idle_s=self._arrived - begin,
            exchange_s=time.perf_counter() - self._arrived,
            participants=len(self._present),
            clipped=clipped,
        )

    def _sum_exactly(self, number: int, values: np.ndarray) -> np.ndarray:
        """Return the sums of [n] float64, to 2^-48: NaN where somebody's value is not finite or too large."""
        n = len(values)
        wrong = ~(np.abs(values) < ring.EXACT_LIMIT)
        integers = ring.encode_exact(np.concatenate([np.where(wrong, 0.0, values), wrong]))
        total = ring.decode_exact(self._agree(number, len(integers), lambda: integers).values)
        return np.where(total[n:] > 0.5, np.nan, total[:n])

    def _sum_update(self, request: SumRequest) -> tuple[np.ndarray, float, int]:
        """Return (sum, sum of weights, values that were clipped), after agreeing on the bounds of all blocks.

        Updates are summed once only, whatever the bounds are.
        """
        number = request.number
        vector = request.vector
        weight = request.weight
        n = len(vector)
        blocks = blocks_of(request.tensor_lengths)
        bounds = request.bounds
        if bounds is None:
            bounds = self._sum_exactly(number, self.bounds_of(vector, request.tensor_lengths))
        wrong = ~(np.isfinite(bounds) & (bounds >= 0))
        if wrong.any():
            raise FedSpeedError(
                f"exchange {number}: the norm bounds of all participants' updates sum to "
                f"{float(bounds[wrong][0])}: an update is beyond {MAX_NORM_BOUND:.3g}, or somebody sends an "
                "invalid bound; lower train.lr, or set train.clip"
            )
        agreed = self._agree(number, n + 2 * ring.LIMBS, lambda: self._encode(vector, weight, blocks, bounds))
        total_weight, clipped = ring.decode_exact(agreed.values[n:])
        if not 0 <= total_weight < math.inf:
            raise FedSpeedError(
                f"exchange {number}: the weights of all participants sum to {total_weight}: somebody sends "
                "an invalid weight"
            )
        total = BUFFERS.take(n, dtype=np.float32)
        for block, bound in zip(blocks, bounds):
            ring.decode(agreed.values[block], bound, total[block])
        return total, float(total_weight), max(0, round(clipped))

    def _encode(
        self, vector: np.ndarray, weight: float, blocks: list[slice], bounds: np.ndarray
    ) -> np.ndarray:
        """Return what this participant adds to the sum: the update's fixed-point integers, then the limbs of
        its weight and of the number of values that were clipped.
        """
        n = len(vector)
        integers = BUFFERS.take(n + 2 * ring.LIMBS, dtype=np.uint32)
        random = _random(CIPHERS[self._config.cipher])
        clipped = sum(
            ring.encode(vector[block], bound, random, integers[block]) for block, bound in zip(blocks, bounds)
        )
        integers[n:] = ring.encode_exact(np.array([weight, clipped]))
        return integers

    # Attempts.

    def _agree(self, number: int, length: int, integers: Callable[[], np.ndarray]) -> AgreedSum:
        """Make attempts until one gives a sum; each leaves out whoever was lost or convicted in the one
        before.

        Args:
            length: how many 32-bit integers are summed. integers: returns this participant's, in each
                attempt.

        Raises:
            LostPeerError: too few participants are left, or no attempt succeeded.
            FedSpeedError: the others have convicted this participant.
        """
        reasons: list[str] = []
        self._begun = self._arrived is not None
        threshold = len(self._roster) // 2 + 1
        needed = max(threshold, self._config.min_participants)
        for _ in range(self._config.attempts):
            if len(self._present) < needed:
                raise LostPeerError(
                    f"{len(self._present)} of {len(self._roster)} participants are left, fewer than the "
                    f"{needed} that a sum needs ({'; '.join(reasons)}); the same command goes on from the "
                    "journal"
                )
            self._attempts += 1
            try:
                return self._attempt(length, integers, threshold)
            except AttemptFailed as failure:
                reasons.append(self._describe(failure))
                if failure.fatal:
                    break
                self._exclude(failure)
                LOG.info(f"exchange {number}: {reasons[-1]}; once more with fresh masks")
        raise LostPeerError(
            f"the exchange failed: {'; '.join(reasons)}; the same command goes on from the journal"
        )

    def _exclude(self, failure: AttemptFailed) -> None:
        """Leave out the participants that were lost, and those that are blamed alone, which is a proof.

        Raises:
            FedSpeedError: this participant is one of them.
        """
        convicted = {next(iter(group)) for group in failure.blamed if len(group) == 1}
        excluded = [self._present[i] for i in (failure.lost | convicted)]
        if self._transport.rank in excluded:
            raise FedSpeedError(
                f"the others have convicted this participant of spoiling the exchange: {failure}"
            ) from failure
        self._present = [p for p in self._present if p not in excluded]

    def _describe(self, failure: AttemptFailed) -> str:
        """Return the reason, followed by transport numbers where those of the attempt are different ones."""

        def numbers(members: frozenset[int], separator: str) -> str:
            return separator.join(str(self._present[i]) for i in sorted(members))

        text = str(failure)
        if failure.lost:
            text += f" (lost: {numbers(failure.lost, ', ')})"
        blamed = " or ".join(numbers(group, "/") for group in failure.blamed)
        if blamed and self._present != list(range(len(self._roster))):
            text += f" (participants {blamed})"
        return text

    def _attempt(self, length: int, integers: Callable[[], np.ndarray], threshold: int) -> AgreedSum:
        """Play one attempt over the transport. Raises AttemptFailed if it gives no sum."""
        mode = MODES[self._config.mode]
        parameters = PublicParameters(
            members=tuple(self._roster[p] for p in self._present),
            length=length,
            settings=self._settings,
            attempt=self._attempts,
            masked=mode.masked,
            relays=min(self._config.relays, len(self._present) - 1) if mode.mixed else 0,
            chunk_length=self._config.cell_kib * 256,
            cipher=self._config.cipher,
            threshold=threshold,
        )
        me = self._present.index(self._transport.rank)
        steps = Member(parameters, me, self._identity, integers).run()
        swap = next(steps)
        while True:
            lost: MembersLost | None = None
            try:
                arrived = self._swap(swap)
            except PeersLost as error:
                members = frozenset(self._present.index(p) for p in error.peers)
                lost = MembersLost(members, error.recovering)
            try:
                swap = steps.throw(lost) if lost else steps.send(arrived)
            except StopIteration as stop:
                return stop.value

    def _swap(self, swap: Swap) -> list[Payload]:
        """Exchange messages with the members of the attempt; return what arrived, by member.

        Raises:
            PeersLost: some of them do not answer, or have begun to recover.
        """
        size = self._transport.size
        parts: list[Payload] = [b""] * size
        sizes = [0] * size
        for i, p in enumerate(self._present):
            parts[p] = swap.parts[i]
            sizes[p] = swap.sizes[i]
        first = swap.phase == "announce" and not self._begun  # the others may still be training
        deadline_s = self._deadline_s if first else self._config.step_deadline_s
        arrived = self._transport.swap(parts, sizes, deadline_s, (self._attempts, PHASES.index(swap.phase)))
        if self._arrived is None:
            self._arrived = time.perf_counter()
        self._begun = True
        return [arrived[p] for p in self._present]


def _random(cipher: type[Cipher]) -> ring.RandomStream:
    """Return a source of random bits: key streams under a random key of the operating system."""
    key = secrets.token_bytes(KEY)
    number = iter(range(2**32))
    return lambda out: fill_key_stream(cipher, key, next(number), out)


def exchange_public_keys(transport: Transport, deadline_s: float, identity: Ed25519PrivateKey) -> list[bytes]:
    """Return the public keys of all participants, sent over the transport itself: for participants of one
    job, which trust the launcher that has started them.
    """
    own = public_bytes(identity)
    size = transport.size
    arrived = transport.swap([own] * size, [len(own)] * size, deadline_s)
    return [bytes(key) for key in arrived]

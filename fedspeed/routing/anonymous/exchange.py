"""The anonymous exchange: vectors become integers, which are summed anonymously (`attempts`).

A float32 vector (an update) is summed in fixed-point numbers (`ring.encode`), for which an exact masked sum
has agreed on the bounds before (`bounds`). A float64 vector (counts, losses) is summed exactly.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError
from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.attempts import Attempts, Summand
from fedspeed.routing.anonymous.bounds import MAX_NORM_BOUND, blocks_of, norm_bounds
from fedspeed.routing.anonymous.crypto import CIPHERS, derive_key, digest, fill_key_stream, public_bytes
from fedspeed.routing.anonymous.settlement import MemoryMarks, SettledMarks, vector_digest
from fedspeed.routing.arrivals import ArrivalTracker
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.exchange import Exchange, Outcome, SumRequest
from fedspeed.routing.transport import Transport


class AnonymousExchange(Exchange):
    """An exchange in which nobody learns more than sums, or whose cell is whose, as `config.mode` says."""

    def __init__(
        self,
        transport: Transport,
        config: RoutingConfig,
        identity: Ed25519PrivateKey,
        roster: Sequence[bytes],
        settings: bytes,
        *,
        names: Sequence[str] = (),
        arrivals: ArrivalTracker | None = None,
        marks: SettledMarks | None = None,
    ):
        """Start the thread of the exchanges.

        Args:
            config: equal on all participants, as far as it is about attempts.
            identity: this participant's private key.
            roster: public keys of all participants, in the order of the transport's numbers.
            settings: digest of everything that must be equal on all sites, and of what all have drawn at this
                start, so that no signature of another start is valid in this one.
            names: of all participants, for messages; empty: their numbers.
            marks: where settled marks are stored; None: in memory.

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
        self._attempts = Attempts(transport, config, identity, roster, settings, names=names)
        self._marks = marks or MemoryMarks()
        self._marks_without_label = MemoryMarks()  # of this start only: numbers begin anew in each
        self._digest_key = derive_key(identity.private_bytes_raw(), b"digest of vectors")
        self._random_key = derive_key(identity.private_bytes_raw(), b"random bits of vectors")
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
        return self._deadline_s + self._attempts.max_wait_s

    def bounds_of(self, vector: np.ndarray, tensor_lengths: Sequence[int]) -> np.ndarray:
        blocks = blocks_of(tensor_lengths)
        random_bits = np.empty(len(blocks), np.uint32)
        self._random(b"norm bounds", vector_digest(self._digest_key, vector, 0.0))(random_bits)
        return norm_bounds(vector, blocks, random_bits)

    @property
    def present(self) -> tuple[int, ...]:
        return self._attempts.present

    def _next_step(self) -> tuple[int, int]:
        return self._attempts.next_step()

    def _run(self, request: SumRequest) -> Outcome:
        begin = time.perf_counter()
        self._attempts.arrived = None
        if request.vector.dtype == np.float64:
            sums = self._sum_exactly(request, np.append(request.vector, request.weight))
            return self._outcome(begin, total=sums[:-1], weight=float(sums[-1]))
        return self._sum_update(request, begin)

    def _outcome(self, begin: float, **values: Any) -> Outcome:
        """Return the outcome of an exchange that began at `begin` (time.perf_counter)."""
        arrived = self._attempts.arrived
        assert arrived is not None, "an attempt that gives a sum has heard everybody"
        return Outcome(
            idle_s=arrived - begin,
            exchange_s=time.perf_counter() - arrived,
            participants=self._attempts.summed,
            **values,
        )

    def _sum_exactly(self, request: SumRequest, values: np.ndarray) -> np.ndarray:
        """Return the sums of [n] float64, to 2^-48: NaN where somebody's value is not finite or too large.

        Args:
            request: whose number and title the sum has.
        """
        n = len(values)
        wrong = ~(np.abs(values) < ring.EXACT_LIMIT)
        integers = ring.encode_exact(np.concatenate([np.where(wrong, 0.0, values), wrong]))
        summand = Summand(
            number=request.number,
            label="",
            title=request.label,
            length=len(integers),
            integers=lambda: integers,
        )
        total = ring.decode_exact(self._attempts.agree(summand).values)
        return np.where(total[n:] > 0.5, np.nan, total[:n])

    def _sum_update(self, request: SumRequest, begin: float) -> Outcome:
        """Sum updates, after agreeing on the bounds of all blocks.

        They are summed over one set of participants only, whatever the bounds are and whatever goes wrong.
        """
        number = request.number
        vector = request.vector
        weight = request.weight
        n = len(vector)
        blocks = blocks_of(request.tensor_lengths)
        bounds = request.bounds
        if bounds is None:
            bounds = self._sum_exactly(request, self.bounds_of(vector, request.tensor_lengths))
        wrong = ~(np.isfinite(bounds) & (bounds >= 0))
        if wrong.any():
            raise FedSpeedError(
                f"exchange {number}: the norm bounds of all participants' updates sum to "
                f"{float(bounds[wrong][0])}: an update is beyond {MAX_NORM_BOUND:.3g}, or somebody sends an "
                "invalid bound; lower train.lr, or set train.clip"
            )
        own_digest = vector_digest(self._digest_key, vector, weight)

        def encode() -> np.ndarray:
            random = self._random(b"rounding", own_digest)
            return self._encode(vector, weight, blocks, bounds=bounds, random=random)

        summand = Summand(
            number=number,
            label=request.label or f"exchange {number}",
            title=request.label,
            state=request.state,
            length=n + 2 * ring.LIMBS,
            integers=encode,
            # Openings of one update with other bounds, each rounded otherwise, would tell more than its sum.
            vector=digest(b"update", own_digest, bounds.astype(np.float64).tobytes()),
            marks=self._marks if request.label else self._marks_without_label,
        )
        agreed = self._attempts.agree(summand)
        total_weight, clipped = ring.decode_exact(agreed.values[n:])
        if not 0 <= total_weight < math.inf:
            raise FedSpeedError(
                f"exchange {number}: the weights of all participants sum to {total_weight}: somebody sends "
                "an invalid weight"
            )
        total = BUFFERS.take(n, dtype=np.float32)
        for block, bound in zip(blocks, bounds):
            ring.decode(agreed.values[block], bound, total[block])
        return self._outcome(
            begin,
            total=total,
            weight=float(total_weight),
            clipped=max(0, round(clipped)),
            skipped=bool(agreed.skip_reasons),
        )

    def _encode(
        self,
        vector: np.ndarray,
        weight: float,
        blocks: list[slice],
        *,
        bounds: np.ndarray,
        random: ring.RandomStream,
    ) -> np.ndarray:
        """Return what this participant adds to the sum: the update's fixed-point integers, then the limbs of
        its weight and of the number of values that were clipped.

        Args:
            random: source of the bits by which values are rounded.
        """
        n = len(vector)
        integers = BUFFERS.take(n + 2 * ring.LIMBS, dtype=np.uint32)
        clipped = sum(
            ring.encode(vector[block], bound, random, integers[block]) for block, bound in zip(blocks, bounds)
        )
        integers[n:] = ring.encode_exact(np.array([weight, clipped]))
        return integers

    def _random(self, purpose: bytes, vector: bytes) -> ring.RandomStream:
        """Return a source of bits that are random for all others, and the same whenever this participant sums
        the same vector: a round that is repeated gives the same sum, to the last bit.

        Args:
            vector: digest of the vector.
        """
        cipher = CIPHERS[self._config.cipher]
        key = derive_key(self._random_key, purpose, vector)
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

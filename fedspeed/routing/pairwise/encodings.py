"""The two forms in which values travel in a pairwise-masked sum. Pure.

    native    FATE's own. A value is split into its fraction and its integer part, both float64: 16 bytes up,
              and 8 down for the sum. Masks are floats, uniform between -1e7 and 1e7, and are split likewise.
              Sums of integer parts are exact. Fractions of K participants are added less than 2 K^2 times,
              each time to less than K^2 with a relative error of 2^-53: for values below 2^20 the sum is
              wrong by less than 1e-8 for K up to 64, and by 1e-14 or so for a few.
    compact   fixed-point integers modulo 2^32: 4 bytes up and 4 down. Masks are uniform over all integers and
              cancel exactly, so that all that is lost is the rounding of each participant's values to
              multiples of 2^-26.

Values have been multiplied by their participant's share of all weights, as in FATE.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspeed.routing.anonymous.crypto import ChaCha20, Combine, combine_key_streams, fill_key_stream

NATIVE_RANGE = 1e7  # masks of `native` are drawn between minus this and this
FRACTION_BITS = 26  # of `compact`: a resolution of 1.5e-8
MAX_INTEGER = (1 << 31) - 1
MAX_VALUE = MAX_INTEGER / (1 << FRACTION_BITS)  # of an unweighted value in `compact`: just below 32

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PairStream:
    """The key of the masks that two participants share, and whether this one adds or subtracts them."""

    key: bytes
    adds: bool


class Encoding(ABC):
    """How values are masked and summed.

    Attributes:
        name: as an option of a method names it.
        bytes_up: a value, from a participant to the arbiter. bytes_down: a value of the sum, to everyone.
    """

    name: str
    bytes_up: int
    bytes_down: int

    @abstractmethod
    def masked(
        self, values: Array, share: float, streams: Sequence[PairStream], number: int
    ) -> tuple[Array, int]:
        """Return (masked values as the arbiter takes them, how many were beyond the range).

        Args:
            values: [n] float64, already multiplied by `share`. share: of the participant's weight in the sum
                of all weights.
            streams: one for each other participant. number: of the sum, which no other sum of these keys has.
        """

    @abstractmethod
    def read(self, data: Array, n: int) -> Array:
        """Return the masked values of a participant from their bytes [n * bytes_up] uint8."""

    @abstractmethod
    def add(self, total: Array, masked: Array) -> None:
        """Add masked values to others, in place."""

    @abstractmethod
    def sent_down(self, total: Array) -> Array:
        """Return what the arbiter sends for the sum of everybody's masked values."""

    @abstractmethod
    def decoded(self, data: Array) -> Array:
        """Return the sum of all values from the bytes [n * bytes_down] uint8 of the arbiter: [n] float64."""


class Native(Encoding):
    """Fractions and integer parts, [2, n] float64."""

    name = "native"
    bytes_up = 16
    bytes_down = 8

    def masked(
        self, values: Array, share: float, streams: Sequence[PairStream], number: int
    ) -> tuple[Array, int]:
        parts = np.empty((2, values.size))
        np.modf(values, parts[0], parts[1])
        split = np.empty_like(parts)
        for stream in streams:
            np.modf(uniform_masks(stream.key, number, values.size), split[0], split[1])
            (np.add if stream.adds else np.subtract)(parts, split, out=parts)
        return parts, 0

    def read(self, data: Array, n: int) -> Array:
        return data.view(np.float64).reshape(2, n)

    def add(self, total: Array, masked: Array) -> None:
        total += masked

    def sent_down(self, total: Array) -> Array:
        return total[0] + total[1]

    def decoded(self, data: Array) -> Array:
        return data.view(np.float64)


class Compact(Encoding):
    """Fixed-point integers, [n] uint32 that stand for int32.

    A participant's integers are clipped to floor(share * MAX_INTEGER), as if its unweighted values were
    clipped to MAX_VALUE. These limits sum to at most MAX_INTEGER, so no sum wraps around.
    """

    name = "compact"
    bytes_up = 4
    bytes_down = 4

    def masked(
        self, values: Array, share: float, streams: Sequence[PairStream], number: int
    ) -> tuple[Array, int]:
        limit = int(share * MAX_INTEGER)
        rounded = np.rint(values * float(1 << FRACTION_BITS))
        clipped = int(np.count_nonzero(np.abs(rounded) > limit))
        integers = np.clip(rounded, -limit, limit).astype(np.int32).view(np.uint32)
        combined: list[tuple[bytes, Combine]] = [
            (stream.key, np.add if stream.adds else np.subtract) for stream in streams
        ]
        combine_key_streams(ChaCha20, number, integers, combined)
        return integers, clipped

    def read(self, data: Array, n: int) -> Array:
        return data.view(np.uint32)

    def add(self, total: Array, masked: Array) -> None:
        np.add(total, masked, out=total)

    def sent_down(self, total: Array) -> Array:
        return total

    def decoded(self, data: Array) -> Array:
        return data.view(np.int32) / float(1 << FRACTION_BITS)


ENCODINGS: dict[str, type[Encoding]] = {encoding.name: encoding for encoding in (Native, Compact)}


def uniform_masks(key: bytes, number: int, n: int) -> Array:
    """Return the float masks of a pair: [n] float64, uniform over multiples of 2^-53 times the range.

    Args:
        key: 32 bytes that the pair shares. number: of the key's stream (ChaCha20, 8 bytes a mask).
    """
    stream = np.empty(2 * n, np.uint32)
    fill_key_stream(ChaCha20, key, number, stream)
    unit = (stream.view(np.uint64) >> 11) * 2.0**-53
    return NATIVE_RANGE * (2.0 * unit - 1.0)

"""FATE's secure aggregation: a sum under pairwise masks, which one participant, the arbiter, adds up.

Each two participants agree on a secret (X25519) and derive the key of a ChaCha20 stream from it. Of the masks
in that stream the one with the lower number subtracts each from its value, and the other adds it, so that the
masks cancel in the sum of all. The arbiter receives everybody's masked values, and sends the sum to everyone:
FATE's protocol (fate.arch.protocol.secure_aggregation, FATE 2.2), written from its mathematics.

It is here so that FATE-LLM can be measured as it is, and protects less than `routing.mode=mask`. It is
therefore a form of `routing.mode=plain`:

- *Statistical hiding only*, in the native encoding: float masks of limited range are not uniform around every
  value. A masked fraction beyond the range of the masks' own fractions tells the sign of its value, the more
  often the larger values are beside 1.
- *No self masks.* Whoever gets a participant's pairwise secrets later reads all its updates of the run.
- *One missing participant breaks the sum*, because its masks stay in it. FATE has no recovery either.
- *Weights are in clear*, and with them everybody's share.
- *The arbiter is believed.* It can send any sum, and different ones to different participants. Keys are not
  signed: whoever controls the transport can sit between two participants.
- Of K participants, K - 1 together, and any participant of two, read the update that is left.

What differs from FATE: the arbiter is the first participant, not a party of its own, so it adds its own
values as well and knows the masks that it shares with each of the others; its own values travel nowhere. Keys
are derived from the X25519 secrets by HKDF, and streams are numbered by the exchanges of a run, where FATE
uses the secret itself as the seed of one long stream. A key of small order is refused.
"""

import time
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.errors import FedSpeedError
from fedspeed.routing.anonymous.crypto import (
    KEY,
    AuthenticationError,
    derive_key,
    public_bytes,
    shared_secret,
)
from fedspeed.routing.arrivals import ArrivalTracker
from fedspeed.routing.exchange import Outcome, PlainExchange, SumRequest
from fedspeed.routing.pairwise.encodings import Array, Encoding, PairStream
from fedspeed.routing.transport import Payload, Transport, all_gather, as_bytes

ARBITER = 0
COUNT_BYTES = 8  # of the number of clipped values, before the values in both directions
NOT_FINITE = -1  # sent instead of that number: the sender's update has values that are not finite
# Why there is no sum. The arbiter sends `_refusal` instead of the number, so that all say the same.
REFUSALS = (
    "the update of participant {sender} has values that are not finite; lower train.lr, or set train.clip",
    "the masked update of participant {sender} has values that are not finite, which is impossible",
    "participant {sender} says that an impossible number of values were clipped",
)
OWN_NOT_FINITE, MASKED_NOT_FINITE, IMPOSSIBLE_COUNT = range(len(REFUSALS))


class PairwiseExchange(PlainExchange):
    """Sums updates under pairwise masks. As in the masked modes, a float32 vector is an update; a float64
    vector (counts, losses) is summed as by `PlainExchange`.

    A participant sends, for an update of n values: its head (32 bytes to everyone, as in every plain
    exchange), COUNT_BYTES + n `bytes_up` to the arbiter, and in the first sum its public key (32 bytes to
    everyone). The arbiter sends COUNT_BYTES + n `bytes_down` to each. Where an update cannot be summed, the
    messages have the same lengths, and all participants raise the same error.
    """

    def __init__(
        self,
        transport: Transport,
        deadline_s: float,
        arrivals: ArrivalTracker | None = None,
        *,
        encoding: Encoding,
    ):
        """Start the thread; see `Exchange`. All participants have the same `encoding`."""
        self._encoding = encoding
        self._streams: list[PairStream] | None = None  # until the keys are exchanged, in the first sum
        super().__init__(transport, deadline_s, arrivals)

    def _run(self, request: SumRequest) -> Outcome:
        if request.vector.dtype != np.float32:
            return super()._run(request)
        begin = time.perf_counter()
        weight = float(self._weights(request).sum())
        arrived = time.perf_counter()
        share = request.weight / weight if weight else 0.0
        values = request.vector.astype(np.float64) / (weight or 1.0)
        if self._streams is None:
            self._streams = agree_on_streams(self._transport, self._deadline_s)
        if np.isfinite(values).all():
            masked, clipped = self._encoding.masked(values, share, self._streams, request.number)
        else:  # zeros without masks: masks alone would show those of the others' updates
            masked = self._encoding.read(
                np.zeros(values.size * self._encoding.bytes_up, np.uint8), values.size
            )
            clipped = NOT_FINITE
        mean, all_clipped = self._summed(masked, clipped, values.size)
        return Outcome(
            total=(mean * weight).astype(np.float32),
            weight=weight,
            idle_s=arrived - begin,
            exchange_s=time.perf_counter() - arrived,
            participants=self._transport.size,
            clipped=all_clipped,
        )

    def _summed(self, masked: Array, clipped: int, n: int) -> tuple[Array, int]:
        """Return (sum of everybody's values [n] float64, number of clipped values), the same bits on all."""
        size = self._transport.size
        up = COUNT_BYTES + n * self._encoding.bytes_up
        down = COUNT_BYTES + n * self._encoding.bytes_down
        if self._transport.rank != ARBITER:
            self._swap({ARBITER: _message(clipped, masked)}, {})
            return self._opened(self._swap({}, {ARBITER: down})[ARBITER])
        arrived = self._swap({}, dict.fromkeys(range(1, size), up))
        counts = [clipped]
        parts = [masked]
        for sender in range(1, size):
            data = as_bytes(arrived[sender])
            counts.append(int(data[:COUNT_BYTES].view(np.int64)[0]))
            parts.append(self._encoding.read(data[COUNT_BYTES:], n))
        refusal = _refusal(counts, parts, n)
        if refusal is None:
            for part in parts[1:]:
                self._encoding.add(masked, part)
        message = _message(
            sum(counts) if refusal is None else refusal,
            self._encoding.sent_down(masked if refusal is None else np.zeros_like(masked)),
        )
        self._swap(dict.fromkeys(range(1, size), message), {})
        return self._opened(message)

    def _opened(self, data: Payload) -> tuple[Array, int]:
        """Return the sum and the number of clipped values of the arbiter's message.

        Raises:
            FedSpeedError: the arbiter says why there is no sum, or its message is impossible.
        """
        message = as_bytes(data)
        total = self._encoding.decoded(message[COUNT_BYTES:])
        count = int(message[:COUNT_BYTES].view(np.int64)[0])
        sender, reason = divmod(-1 - count, len(REFUSALS))
        if 0 <= sender < self._transport.size:
            raise FedSpeedError(REFUSALS[reason].format(sender=sender))
        if not np.isfinite(total).all():
            raise FedSpeedError(
                f"the sum of the arbiter (participant {ARBITER}) has values that are not finite; lower "
                "train.lr, or set train.clip"
            )
        if not 0 <= count <= total.size * self._transport.size:
            raise FedSpeedError(
                f"the arbiter (participant {ARBITER}) says that {count} values were clipped, which is "
                "impossible"
            )
        return total, count

    def _swap(self, parts: dict[int, Payload], sizes: dict[int, int]) -> list[Payload]:
        """Send messages to some participants and receive from some, in a swap of all."""
        everyone = range(self._transport.size)
        return self._transport.swap(
            [parts.get(i, b"") for i in everyone], [sizes.get(i, 0) for i in everyone], self._deadline_s
        )


def agree_on_streams(transport: Transport, deadline_s: float) -> list[PairStream]:
    """Exchange fresh public keys with all participants, and return the mask stream of each pair that this one
    is in. Collective over the participants.

    Raises:
        FedSpeedError: a participant sends a key of small order.
        TransportError: a participant is missing.
    """
    private = X25519PrivateKey.generate()
    own = np.frombuffer(public_bytes(private), np.uint8)
    keys = [key.tobytes() for key in all_gather(transport, own, deadline_s)]
    return streams_of(private, transport.rank, keys)


def streams_of(private: X25519PrivateKey, me: int, keys: Sequence[bytes]) -> list[PairStream]:
    """Return the mask streams of participant `me` with each of the others.

    Args:
        keys: the public keys of all participants, KEY bytes each.

    Raises:
        FedSpeedError: a key has another length, or small order, so that everybody would know the secret.
    """
    streams = []
    for other, key in enumerate(keys):
        if other == me:
            continue
        if len(key) != KEY:
            raise FedSpeedError(f"participant {other} sends a public key of {len(key)} bytes, not {KEY}")
        try:
            secret = shared_secret(private, key)
        except AuthenticationError as error:
            raise FedSpeedError(f"participant {other} sends {error}, which hides nothing") from error
        numbers = (number.to_bytes(4, "big") for number in sorted((me, other)))
        streams.append(PairStream(derive_key(secret, b"pairwise sum", *numbers), adds=other < me))
    return streams


def _message(count: int, values: Array) -> Array:
    """Return a number of clipped values and values as one message: [bytes] uint8."""
    return np.concatenate([np.array([count], np.int64).view(np.uint8), as_bytes(values)])


def _refusal(counts: Sequence[int], parts: Sequence[Array], n: int) -> int | None:
    """Return the number that the arbiter sends where updates cannot be summed, below 0; None if they can.

    Args:
        counts: what each participant sends as its number of clipped values. parts: its masked values.
        n: length of an update.
    """
    for sender, (count, part) in enumerate(zip(counts, parts, strict=True)):
        reason = None
        if count == NOT_FINITE:
            reason = OWN_NOT_FINITE
        elif not 0 <= count <= n:
            reason = IMPOSSIBLE_COUNT
        elif not np.isfinite(part).all():
            reason = MASKED_NOT_FINITE
        if reason is not None:
            return -1 - (sender * len(REFUSALS) + reason)
    return None

"""What a participant of an audit achieves that sends wrong numbers: weights and norm bounds that are not its
own. Sums are masked, so that only the sums can be checked (`federation.header`).
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.errors import FedSpeedError
from fedspeed.federation.header import Header, Signals, SumLimits
from fedspeed.federation.link import Sum
from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.bounds import blocks_of, norm_bounds
from fedspeed.routing.anonymous.phases import AgreedSum
from fedspeed.routing.audit.payload import encoded
from fedspeed.routing.audit.rehearsal import Lies, Participants, PlayedSum
from fedspeed.routing.config import RoutingConfig


@dataclass(frozen=True)
class Claims:
    """What a participant sends of itself, or a sum over all: the values of a header, and of the update.

    Attributes:
        weight: in the header. bounds: norm bounds of the update, [blocks] float64.
        later_weight: the one that it sends with the update.
    """

    weight: float
    bounds: np.ndarray
    later_weight: float


@dataclass(frozen=True)
class HeaderAttack:
    """A lie in a header.

    Attributes:
        name, description: for the table.
        claim: returns what the liar claims, given the sums over the honest participants in the round before,
            which everybody knows, and routing.max_weight.
        limit: why it is believed, if that is known (fedspeed/routing/THREATS.md).
    """

    name: str
    description: str
    claim: Callable[[Claims, float], Claims]
    limit: str = ""


@dataclass(frozen=True)
class HeaderResult:
    """What a lie in a header has led to.

    Attributes:
        attack: its name. description: in a sentence.
        refused: how many honest participants have refused the sums, of how many.
        mean_error: where nobody has: the relative error of the mean update, against that of honest ones.
        succeeded: whether the mean is another one, and nobody has refused it.
        limit: why that is known.
    """

    attack: str
    description: str
    refused: int
    honest: int
    mean_error: float | None
    succeeded: bool
    limit: str = ""

    @property
    def end(self) -> str:
        """What became of the round, for the table."""
        if self.mean_error is not None:
            return f"believed; mean off by {self.mean_error:.2g}"
        return f"refused by {self.refused} of {self.honest} honest"


def _weight(scale: float) -> Callable[[Claims, float], Claims]:
    """Return a claim of a multiple of the honest participants' weights, the same in header and update."""
    return lambda seen, _: Claims(scale * seen.weight, 0 * seen.bounds, scale * seen.weight)


def _bounds(scale: float) -> Callable[[Claims, float], Claims]:
    """Return a claim of a multiple of the honest participants' norm bounds, and no weight."""
    return lambda seen, _: Claims(0.0, scale * seen.bounds, 0.0)


_WRONG_MEAN = 1e-3  # relative error of a mean from which on it is another one
_SUBTRACTING = "whoever subtracts less than would show in the sum is believed"
HEADER_ATTACKS = (
    HeaderAttack(
        "a huge weight", "Claims a weight of 1e12.", lambda seen, _: Claims(1e12, 0 * seen.bounds, 1e12)
    ),
    HeaderAttack(
        "the largest weight",
        "Claims the largest weight that is allowed, for an update of zeros.",
        lambda seen, largest: Claims(largest, 0 * seen.bounds, largest),
        "routing.max_weight is what one participant can claim: keep it near the largest real one",
    ),
    HeaderAttack("a negative weight", "Claims minus twice the others' weight.", _weight(-2.0)),
    HeaderAttack(
        "a weight of minus a half", "Claims minus half the others' weight.", _weight(-0.5), _SUBTRACTING
    ),
    HeaderAttack(
        "another weight later",
        "Claims the others' weight before the update, and none with it.",
        lambda seen, _: Claims(seen.weight, 0 * seen.bounds, 0.0),
    ),
    HeaderAttack("a negative bound", "Claims minus twice the others' norm bounds.", _bounds(-2.0)),
    HeaderAttack(
        "a bound of minus a half", "Claims minus half the others' norm bounds.", _bounds(-0.5), _SUBTRACTING
    ),
    HeaderAttack(
        "a huge bound",
        "Claims a million times the others' norm bounds; few digits of the sum are left.",
        _bounds(1e6),
        "whoever sends a huge bound spoils the round, as with a huge update",
    ),
)


class HeaderRehearsal:
    """A round's header and update among honest participants and one that lies about its numbers.

    Args:
        config: of the exchange, with its mode resolved.
        updates: by participant, [length] float32, weighted. weights: by participant.
        liars: participants that collude; the first one lies, and the update of all of them is zero.
    """

    def __init__(
        self,
        config: RoutingConfig,
        updates: Sequence[np.ndarray],
        weights: Sequence[float],
        liars: frozenset[int],
    ):
        self._config = config
        self._updates = updates
        self._weights = weights
        self._liars = liars
        self._honest = [i for i in range(len(updates)) if i not in liars]
        self._blocks = blocks_of([len(updates[0])])
        self._limits = SumLimits(
            max_weight=config.max_weight, clients=len(updates), ranks=len(updates), steps=1
        )

    def play_all(self, attacks: Sequence[HeaderAttack] = HEADER_ATTACKS) -> Iterator[HeaderResult]:
        """Yield what each attack has led to."""
        for attack in attacks:
            yield self._play(attack)

    def _play(self, attack: HeaderAttack) -> HeaderResult:
        before = [claims for i, claims in enumerate(self._true_claims()) if i not in self._liars]
        seen = Claims(
            sum(claims.weight for claims in before), np.sum([claims.bounds for claims in before], axis=0), 0.0
        )
        claims = self._true_claims()
        claims[min(self._liars)] = attack.claim(seen, self._config.max_weight)
        header = ring.decode_exact(
            self._sum([
                ring.encode_exact(np.array([claim.weight, claim.weight, *claim.bounds])) for claim in claims
            ])
        )
        refused = [i for i in self._honest if not self._accepts(header, claims[i])]
        mean_error = None
        if not refused:
            update, weight = self._sum_updates(header[2:], claims)
            refused = [i for i in self._honest if not self._accepts(header, claims[i], update, weight)]
            mean_error = None if refused else self._mean_error(update, weight)
        return HeaderResult(
            attack.name,
            attack.description,
            refused=len(refused),
            honest=len(self._honest),
            mean_error=mean_error,
            succeeded=mean_error is not None and mean_error > _WRONG_MEAN,
            limit=attack.limit,
        )

    def _true_claims(self) -> list[Claims]:
        """Return what all send that do not lie; the coalition adds nothing. Norm bounds are drawn anew."""
        claims = []
        for i, (update, weight) in enumerate(zip(self._updates, self._weights, strict=True)):
            bits = np.frombuffer(secrets.token_bytes(4 * len(self._blocks)), np.uint32)
            bounds = norm_bounds(update, self._blocks, bits)
            claims.append(
                Claims(0.0, 0 * bounds, 0.0) if i in self._liars else Claims(weight, bounds, weight)
            )
        return claims

    def _sum(self, integers: list[np.ndarray]) -> np.ndarray:
        """Return the sum of all participants' integers, through the exchange."""
        participants = Participants(self._config, integers, self._liars)
        end = PlayedSum(participants, Lies(), b"header").ends[self._honest[0]]
        assert isinstance(end, AgreedSum), f"nobody disturbs this sum, but: {end}"
        return end.values

    def _accepts(
        self, sums: np.ndarray, own: Claims, update: np.ndarray | None = None, weight: float = 0.0
    ) -> bool:
        """Return whether an honest participant goes on: after the header, or after the sum of the updates.

        Args:
            sums: of the header: [2 + blocks] float64. own: its own values. update, weight: sums.
        """
        size = len(self._updates)
        header = Header(
            bounds=sums[2:],
            weight=float(sums[0]),
            weighted_steps=float(sums[1]),
            signals=Signals(size, 0, 0),
            participants=size,
            limits=self._limits,
        )
        try:
            header.check(np.array([own.weight] * 2), Signals(1, 0, 0), own.bounds, "header")
            if update is not None:
                total = Sum(
                    vector=update,
                    weight=weight,
                    idle_s=0.0,
                    exchange_s=0.0,
                    participants=size,
                    clipped=0,
                    skipped=False,
                    bytes_sent=0,
                )
                header.check_update(total, own_weight=own.weight, place="round 1")
        except FedSpeedError:
            return False
        return True

    def _sum_updates(self, bounds: np.ndarray, claims: Sequence[Claims]) -> tuple[np.ndarray, float]:
        """Return the sums of updates [length] float32 and weights; the coalition adds an update of zeros."""
        length = len(self._updates[0])
        vectors = []
        for i, update in enumerate(self._updates):
            sent = np.zeros_like(update) if i in self._liars else update
            pieces = [encoded(sent[block], float(bound)) for block, bound in zip(self._blocks, bounds)]
            vectors.append(np.concatenate([*pieces, ring.encode_exact(np.array([claims[i].later_weight]))]))
        summed = self._sum(vectors)
        total = np.empty(length, np.float32)
        for block, bound in zip(self._blocks, bounds, strict=True):
            ring.decode(summed[block], float(bound), total[block])
        return total, float(ring.decode_exact(summed[length:])[0])

    def _mean_error(self, update: np.ndarray, weight: float) -> float:
        """Return the relative error of the mean, against that of honest participants alone."""
        true = np.sum([self._updates[i] for i in self._honest], axis=0, dtype=np.float64)
        true /= sum(self._weights[i] for i in self._honest)
        norm = float(np.linalg.norm(true))
        return float(np.linalg.norm(update / weight - true)) / norm if norm and weight else 1.0

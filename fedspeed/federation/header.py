"""What all ranks know before an update is sent, and whether the sums in it are possible. Pure.

In the masked modes every participant can send any number into a sum, and nobody sees who did. A sum is
bounded from above by what is public (`SumLimits`), and from below by this participant's own summand, because
no summand is negative. Who lies within these bounds is not noticed; fedspeed/routing/THREATS.md says what
that makes possible.
"""

from dataclasses import dataclass

import numpy as np

from fedspeed.errors import FedSpeedError
from fedspeed.evaluation.config import EVAL_TASKS
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.link import Sum
from fedspeed.monitor.metrics.evaluation import score_slot, weight_slot

# Of exact sums: they are rounded to 2^-48, and added in another order than this rank's values.
_RELATIVE_ERROR = 1e-9
_ABSOLUTE_ERROR = 1e-6
MAX_STEP_TOKENS = 1 << 31  # of one client in one local step; no hardware trains more
MAX_SITE_CLIENTS = 10_000  # the largest data.clients; a site does not know that of another one
MAX_SITE_RANKS = 10_000
# Slots of the ledger that count something, each with the slot that it can at most be equal to.
COUNTED_IN = {
    "received": "asked",
    "exact": "rows",
    "stop": "ranks",
    "renew": "ranks",
    "clip_shortened": "clip_updates",
} | {score_slot(name): weight_slot(name) for name, entry in EVAL_TASKS.items() if entry.unit == "accuracy"}
LOSSES = (
    "train_loss",
    "val_loss",
    *(score_slot(name) for name, entry in EVAL_TASKS.items() if entry.unit == "loss"),
)


@dataclass(frozen=True, kw_only=True)
class SumLimits:
    """Hold what is public about the participants of a run, and bounds its sums.

    Attributes:
        max_weight: of one participant (routing.max_weight).
        clients, ranks: of one job; of each site, between organisations. steps: local steps of a client in an
            exchange.
        sites: whether every participant is a job of its own.
    """

    max_weight: float
    clients: int
    ranks: int
    steps: int
    sites: bool = False

    def of_clients(self, participants: int) -> int:
        """Return how many clients so many participants can have."""
        return self.clients * (participants if self.sites else 1)

    def of_ranks(self, participants: int) -> int:
        """Return how many ranks so many participants can have."""
        return self.ranks * (participants if self.sites else 1)


@dataclass(frozen=True)
class SummedLedger:
    """Hold the sum of ledgers, and this client's summand of it: vectors of `Ledger.vector`."""

    total: np.ndarray
    own: np.ndarray

    def __add__(self, other: "SummedLedger") -> "SummedLedger":
        return SummedLedger(self.total + other.total, self.own + other.own)


@dataclass(frozen=True)
class Signals:
    """Count ranks, and those that want the run to stop: one rank's, or the sum over all.

    Attributes:
        stop: how many were asked to end. renew: how many have a newer roster.
    """

    ranks: float
    stop: float
    renew: float

    @property
    def wants_renewal(self) -> bool:
        """Return whether all ranks have a newer roster."""
        return self.renew > self.ranks - 0.5

    @property
    def wants_stop(self) -> bool:
        """Return whether the run is to stop: a rank was asked to, or all have a newer roster."""
        return self.stop > 0.5 or self.wants_renewal


@dataclass(frozen=True, kw_only=True)
class Header:
    """Hold what is known before an update is sent.

    Attributes:
        ledger: of the round that the header settles, summed over all ranks; None where it settles none.
        bounds: sums of norm bounds (`Exchange.bounds_of`); None where nothing but a ledger has been summed
            (mode plain).
        weight, weighted_steps: sums over all clients in the update.
        signals: sums over all ranks; None where nothing but a ledger has been summed.
        participants: how many participants were in the sum.
        limits: of the run's sums.
    """

    ledger: Ledger | None = None
    bounds: np.ndarray | None = None
    weight: float = 0.0
    weighted_steps: float = 0.0
    signals: Signals | None = None
    participants: int = 0
    limits: SumLimits | None = None

    def check(
        self, own_weights: np.ndarray, own_signals: Signals, own_bounds: np.ndarray, label: str
    ) -> None:
        """Check the sums of the header itself, except its ledger.

        Args:
            own_weights: this participant's weight and weighted steps: [2] float64. own_signals: of its ranks.
            own_bounds: its norm bounds: [k] float64. label: of the exchange, for the message.

        Raises:
            FedSpeedError: a sum is impossible.
        """
        limits = self.limits
        assert limits is not None and self.bounds is not None and self.signals is not None, "it has sums"
        own_weight, own_steps = own_weights.tolist()
        refuse(
            weight_problem(self.weight, own_weight, self.participants, limits.max_weight)
            or steps_problem(self.weighted_steps, self.weight, own_steps, limits.steps)
            or signals_problem(self.signals, own_signals, limits.of_ranks(self.participants))
            or bounds_problem(self.bounds, own_bounds),
            f"the {label}",
        )

    def check_update(self, total: Sum, *, own_weight: float, place: str) -> None:
        """Compare the sum of an update with its header; do nothing where the header has no weights.

        Args:
            own_weight: this participant's. place: of the exchange, for the message.

        Raises:
            FedSpeedError: the sum of weights is impossible.
        """
        if self.limits is None:
            return
        problem = weight_problem(total.weight, own_weight, total.participants, self.limits.max_weight)
        is_same_set = total.participants == self.participants
        if not problem and is_same_set and not _near(total.weight, self.weight):
            problem = f"the weights sum to {total.weight:g}, and to {self.weight:g} in the header before it"
        if not problem and not 0 <= total.clipped <= total.participants * total.vector.size:
            problem = f"{total.clipped} values were clipped of {total.participants} x {total.vector.size}"
        refuse(problem, f"the update of {place}")


def refuse(problem: str, what: str) -> None:
    """Raise a FedSpeedError for sums of a problem; do nothing if the problem is empty."""
    if problem:
        raise FedSpeedError(
            f"{what}: some participant sends impossible numbers, and a masked sum does not show which: "
            f"{problem}; compare the versions of FedSpeed and the settings of all participants. The same "
            "command goes on from the journal"
        )


def weight_problem(weight: float, own: float, participants: int, max_weight: float) -> str:
    """Return why the sum of all participants' weights is impossible; empty if it is not.

    Args:
        own: this participant's weight. max_weight: of one participant.
    """
    most = participants * max_weight
    if at_least(weight, own) and weight <= most * (1 + _RELATIVE_ERROR) + _ABSOLUTE_ERROR:
        return ""
    return (
        f"the weights of {participants} participants sum to {weight:g}, which is not between this one's own "
        f"{own:g} and {most:g} (routing.max_weight={max_weight:g} each)"
    )


def steps_problem(weighted_steps: float, weight: float, own: float, steps: int) -> str:
    """Return why a sum of weight times local steps is impossible; empty if it is not.

    Args:
        weight: sum of the weights. own: this participant's summand. steps: the most a client takes.
    """
    if at_least(weighted_steps, max(own, weight)) and at_least(steps * weight, weighted_steps):
        return ""
    return (
        f"weights of {weight:g} together have taken {weighted_steps:g} weighted local steps, of at most "
        f"{steps} each"
    )


def signals_problem(total: Signals, own: Signals, max_ranks: int) -> str:
    """Return why sums of signals are impossible; empty if they are not.

    Args:
        own: this participant's. max_ranks: of all participants together.
    """
    is_possible = at_least(max_ranks, total.ranks) and at_least(total.ranks, own.ranks)
    for count, least in ((total.stop, own.stop), (total.renew, own.renew)):
        is_possible = is_possible and at_least(count, least) and at_least(total.ranks, count)
    if is_possible:
        return ""
    return (
        f"of {total.ranks:g} ranks (at most {max_ranks}), {total.stop:g} want to stop, and {total.renew:g} "
        "have a newer roster"
    )


def bounds_problem(bounds: np.ndarray, own: np.ndarray) -> str:
    """Return why sums of norm bounds are impossible; empty if they are not.

    Args:
        bounds: [k] float64, sums over all participants. own: [k], this participant's, finite.
    """
    wrong = [float(total) for total, least in zip(bounds, own, strict=True) if not at_least(total, least)]
    if not wrong:
        return ""
    return (
        f"the norm bounds of all updates sum to {wrong[0]:g} in one of {len(bounds)} blocks: an update is "
        "too large (lower train.lr, or set train.clip), or a bound is wrong"
    )


def ledger_problem(total: Ledger, own: Ledger, participants: int, limits: SumLimits) -> str:
    """Return why the sum of ledgers of a round is impossible; empty if it is not.

    A loss may be NaN, which a participant sends whose own loss is not finite.

    Args:
        own: this client's summand. participants: how many took part.
    """
    sums = total.sums()
    least = own.sums()
    for name in total.amounts():
        is_unknown_loss = name in LOSSES and np.isnan(sums[name])
        if not (is_unknown_loss or at_least(sums[name], max(0.0, least[name]))):
            return f"{name} sums to {sums[name]:g}, where this one alone has {least[name]:g}"
    most = {
        "asked": limits.of_clients(participants),
        "ranks": limits.of_ranks(participants),
        "tokens": limits.of_clients(participants) * limits.steps * MAX_STEP_TOKENS,
    }
    for name, limit in most.items():
        if name in sums and not at_least(limit, sums[name]):
            return f"{name} sums to {sums[name]:g}, which is above {limit}"
    for name, whole in COUNTED_IN.items():
        if name in sums and not at_least(sums[whole], sums[name]):
            return f"{name} sums to {sums[name]:g} of {sums[whole]:g} ({whole})"
    return ""


def at_least(value: float, least: float) -> bool:
    """Return whether a value is finite, and not below another one by more than the error of exact sums."""
    return bool(np.isfinite(value)) and value >= least - _ABSOLUTE_ERROR - _RELATIVE_ERROR * abs(least)


def _near(a: float, b: float) -> bool:
    return at_least(a, b) and at_least(b, a)

"""The exchange before an update. In the masked modes it is one exact sum, the header, of all that must be
known before the update is sent, and of what settles the round before. A round then takes two exchanges: the
header and the update. In mode plain only the ledger of the round before is summed, where there is one.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from fedspeed.data.config import MAX_STEPS, local_steps_of
from fedspeed.federation.contribution import Contribution
from fedspeed.federation.header import (
    MAX_SITE_CLIENTS,
    MAX_SITE_RANKS,
    Header,
    Signals,
    SumLimits,
    SummedLedger,
    ledger_problem,
    refuse,
)
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.rank_components import RankComponents
from fedspeed.federation.round_update import RoundUpdate, TrainedUpdate


def exchange_header(
    components: RankComponents, settled: RoundUpdate | None, ahead: TrainedUpdate | None
) -> Header:
    """Sum what all ranks must know before the update `ahead` is sent, and the ledger of the round that is
    settled. In mode plain without such a round, nothing is exchanged. Collective over all ranks.

    Args:
        settled: a round whose update has been applied; None where none is left to settle.
        ahead: the update that is sent next; None after the last round.

    Raises:
        FedSpeedError: a sum is impossible, so that some participant has sent wrong numbers.
        LostPeerError: a participant is missing.
    """
    if components.config.routing.sums_only:
        return _masked_header(components, settled, ahead)
    if settled is None:
        return Header()
    total = components.recorder.sum_over_ranks(settled.ledger, round=settled.round, training=settled.training)
    settled.signals = Signals(*(total.rank_total(name) for name in ("ranks", "stop", "renew")))
    return Header(ledger=total)


def checked_ledger(components: RankComponents, ledger: Ledger, label: str) -> Ledger:
    """Return the sum of all ranks' ledgers after an evaluation without training, and check it in the masked
    modes. Collective over all ranks.

    Args:
        ledger: with this rank's values. label: of the exchange.
    """
    if not components.config.routing.sums_only:
        return components.recorder.sum_over_ranks(ledger, round=0)
    components.recorder.finish_round(ledger)
    own = components.engine.sum_over_client(ledger.vector)
    total = components.recorder.sum_header(own, label)
    return _checked(components, SummedLedger(total.vector, own), total.participants, label)


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Hold the sums of a header: `trained` of counters of the local steps before the update, `settling` of
    what settles the round before.
    """

    trained: SummedLedger
    settling: SummedLedger
    header: Header


def _masked_header(
    components: RankComponents, settled: RoundUpdate | None, ahead: TrainedUpdate | None
) -> Header:
    """Sum and check a header. The counters of a round's local steps travel with its update, and what is
    measured after the update with the next header.
    """
    recorder = components.recorder
    settlement = recorder.ledger()
    if settled is not None:
        settlement = settled.ledger
        recorder.finish_round(settlement, settled.training)
    if ahead is not None:
        sums = _sum(
            components,
            ahead.contribution,
            components.method.segments(ahead.update.round),
            ledgers=(ahead.update.ledger, settlement),
            label=f"header of {ahead.place}",
        )
        earlier = ahead.update.summed
        ahead.update.summed = sums.trained if earlier is None else earlier + sums.trained
        ahead.update.ledger = recorder.ledger()
        ahead.update.signals = sums.header.signals
    else:
        assert settled is not None, "a header is for an update, for a round to settle, or for both"
        sums = _sum(
            components,
            Contribution.empty(0),
            (0,),
            ledgers=(recorder.ledger(), settlement),
            label=f"closing header of round {settled.round}",
        )
    if settled is None:
        return sums.header
    assert settled.summed is not None, "the header before the round's update has summed its counters"
    whole = settled.summed + sums.settling
    return replace(
        sums.header, ledger=_checked(components, whole, sums.header.participants, f"round {settled.round}")
    )


def _sum(
    components: RankComponents,
    contribution: Contribution,
    segments: Sequence[int],
    *,
    ledgers: tuple[Ledger, Ledger],
    label: str,
) -> _Sums:
    """Sum the values of a header over all participants: weight and weighted steps of the update, signals and
    two ledgers of this rank (see `_Sums`), and the norm bounds of the update.

    Raises:
        FedSpeedError: weights, steps or norm bounds are impossible.
    """
    signals = astuple(components.recorder.signals())
    counted = np.concatenate([signals, *(ledger.vector for ledger in ledgers)])
    own_counted = components.engine.sum_over_client(counted)
    own_weights = np.array([contribution.weight, contribution.weighted_steps])
    own_bounds = components.link.bounds_of(contribution.vector, segments)
    total = components.recorder.sum_header(np.concatenate([own_weights, own_counted, own_bounds]), label)
    ends = np.cumsum([len(signals), *(ledger.vector.size for ledger in ledgers)])
    own_signals, own_trained, own_settling, _ = np.split(own_counted, ends)
    weights, summed = np.split(total.vector, [len(own_weights)])
    summed_signals, trained, settling, bounds = np.split(summed, ends)
    header = Header(
        bounds=bounds,
        weight=float(weights[0]),
        weighted_steps=float(weights[1]),
        signals=Signals(*summed_signals.tolist()),
        participants=total.participants,
        limits=limits_of(components),
    )
    header.check(own_weights, Signals(*own_signals.tolist()), own_bounds, label)
    return _Sums(
        trained=SummedLedger(trained, own_trained),
        settling=SummedLedger(settling, own_settling),
        header=header,
    )


def _checked(components: RankComponents, summed: SummedLedger, participants: int, what: str) -> Ledger:
    """Return the ledger of a sum. Raises FedSpeedError where it is impossible."""
    total = components.recorder.ledger_of(summed.total)
    own = components.recorder.ledger_of(summed.own)
    refuse(ledger_problem(total, own, participants, limits_of(components)), what)
    return total


def limits_of(components: RankComponents) -> SumLimits:
    """Return what is public about a run's participants."""
    config = components.config
    sites = config.routing.between_organisations
    clusters = ("", *config.train.local_steps_by_cluster)
    steps = max(local_steps_of(config.train, cluster) for cluster in clusters)
    return SumLimits(
        max_weight=config.routing.max_weight,
        clients=MAX_SITE_CLIENTS if sites else config.data.clients,
        ranks=MAX_SITE_RANKS if sites else components.role.ranks,
        # Nobody knows how many rows another participant has.
        steps=MAX_STEPS if config.federation.round_budget == "epoch" else steps,
        sites=sites,
    )

"""The federated rounds: clients train from the global state, their updates are summed and applied, the new
state is evaluated, and the round is reported and journalled.
"""

import math

from fedspeed.errors import FedSpeedError
from fedspeed.federation import overlap, pacing, round_update
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.rank_components import RankComponents
from fedspeed.federation.recorder import held_out_loss
from fedspeed.federation.round_evaluation import evaluate
from fedspeed.federation.round_update import AppliedUpdate, SentUpdate, TrainedUpdate
from fedspeed.federation.run_progress import Progress, ending
from fedspeed.federation.server_step import server_stepped


def run(components: RankComponents, progress: Progress) -> Progress:
    """Run all rounds that are left after `baseline`, and return the progress after the last one: `done`, or
    `stopped` if the run was asked to end. Collective over all ranks of the run.

    Raises:
        FedSpeedError: training has diverged, or the journal cannot be written.
        LostPeerError: a participant is missing.
    """
    progress.stopped = False
    with components.progress_writer:
        if progress.round:
            components.recorder.start_measuring()
        if components.config.federation.staleness:
            _run_overlapped(components, progress)
        else:
            _run_synchronous(components, progress)
    return progress


def baseline(components: RankComponents, progress: Progress) -> None:
    """Do round 0 unless it is in the journal already: the method's server takes its first step, the state is
    evaluated before any training, and the journal gets the entry from which round 1 can be repeated.

    Raises:
        FedSpeedError: the held-out loss is not finite.
    """
    if progress.round or progress.done:
        return
    if not progress.is_resumed:
        progress.state = server_stepped(components, progress.state, round=0)
    ledger = components.recorder.ledger()
    components.recorder.start_measuring()
    evaluate(components, progress, ledger, "the evaluation before round 1")
    ledger = components.recorder.sum_over_ranks(ledger)
    loss = held_out_loss(ledger)
    if loss is not None and not math.isfinite(loss):
        raise FedSpeedError(
            "the held-out loss is not finite before any training; check the weights in model.base and "
            "adapter.start_from, or choose another model.dtype"
        )
    if components.role.reporter:
        components.recorder.report(0, (), ledger, factor_error_exact=False, clipped=0)
    if not progress.has_best:  # a run that was resumed from round 0 has its best loss from the journal
        components.progress_writer.note_loss(progress, loss)
    components.progress_writer.store_clients(progress, components.link)
    components.progress_writer.certify(progress)
    components.progress_writer.commit(progress)


def _run_synchronous(components: RankComponents, progress: Progress) -> None:
    """Run rounds one after the other: train and exchange, as often as the method does, then settle."""
    while not progress.is_over:
        before = progress.state
        update = round_update.begin(components, progress.round + 1, memory=progress.memory)
        for exchange in range(components.trainer.exchanges):
            trained = round_update.train(
                components, progress, update, start=progress.state, exchange=exchange
            )
            applied = round_update.apply(components, progress, round_update.send(components, trained))
        _settle(components, progress, applied, before=before)


def _run_overlapped(components: RankComponents, progress: Progress) -> None:
    """Train each round while the update of the round before is exchanged, then settle that one."""
    if progress.is_over:
        return
    # After a resume, the first round is trained again from the state that it was trained from before.
    start = progress.state if progress.previous is None else progress.previous
    update = round_update.begin(
        components, progress.round + 1, memory=progress.memory, starts=progress.starts
    )
    sent: SentUpdate | None = round_update.send(
        components, round_update.train(components, progress, update, start=start)
    )
    while sent is not None:
        # Computed after the last round as well: a later run with more federation.rounds begins with these.
        starts = round_update.predicted_starts(components, progress, sent.trained)
        ahead = None
        if sent.round < components.config.federation.rounds:
            update = round_update.begin(components, sent.round + 1, memory=sent.update.memory, starts=starts)
            ahead = round_update.train(components, progress, update, start=progress.state)
        before = progress.state
        progress.previous = before
        progress.starts = starts
        applied = round_update.apply(components, progress, sent)
        sent = _settle(components, progress, applied, before=before, ahead=ahead)


def _settle(
    components: RankComponents,
    progress: Progress,
    applied: AppliedUpdate,
    *,
    before: Arrays,
    ahead: TrainedUpdate | None = None,
) -> SentUpdate | None:
    """Finish a round whose update has been applied: evaluate, decide whether to go on, report, and commit.

    Args:
        before: the global state before the round's update.
        ahead: under staleness, the next round's trained update. It is sent before this round is written down,
            and returned, unless the run is over.
    """
    update = applied.update
    progress.round = update.round
    progress.memory = update.memory
    if pacing.is_evaluated(components.config.federation, update.round):
        evaluate(components, progress, update.ledger, f"the evaluation after round {update.round}")
    components.recorder.note_updates(update.ledger, update.counted)
    ledger = components.recorder.sum_over_ranks(update.ledger, round=update.round, training=update.training)
    components.progress_writer.note_loss(progress, held_out_loss(ledger))
    _decide(components, progress, applied, ledger)
    is_kept = progress.is_over or update.round % components.config.checkpoint.every == 0
    if is_kept:
        components.progress_writer.store_clients(progress, components.link)
        components.progress_writer.certify(progress)
    sent = round_update.send(components, ahead) if ahead is not None and not progress.is_over else None
    # The record precedes the commit: resuming drops a record without a commit, but could not restore one.
    if components.role.reporter:
        round_update.report(components, progress, applied, before=before, ledger=ledger)
    if is_kept:
        components.progress_writer.commit(progress)
    return sent


def _decide(components: RankComponents, progress: Progress, applied: AppliedUpdate, ledger: Ledger) -> None:
    """Decide from the summed ledger, alike on all ranks, whether the run goes on and how updates align."""
    federation = components.config.federation
    if federation.staleness:
        progress.update_alignment = overlap.update_alignment(
            applied.aggregate.state,
            applied.start,
            scale=applied.scale,
            mean_square=ledger.total("delta_square") / applied.weight,
        )
    progress.done = ending(
        progress.round, progress.stale, rounds=federation.rounds, patience=federation.patience
    )
    progress.renewed = ledger.rank_total("renew") > ledger.rank_total("ranks") - 0.5
    progress.stopped = progress.renewed or bool(ledger.of_ranks("stop").any())

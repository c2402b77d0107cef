"""The federated rounds: clients train from the global state, their updates are summed and applied, the new
state is evaluated, and the round is reported and journalled.
"""

import math

from fedspeed.errors import FedSpeedError
from fedspeed.federation import overlap, pacing, round_update
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.rank_components import RankComponents
from fedspeed.federation.recorder import held_out_loss
from fedspeed.federation.round_evaluation import evaluate, score_tasks
from fedspeed.federation.round_header import checked_ledger, exchange_header
from fedspeed.federation.round_update import AppliedUpdate, RoundUpdate, SentUpdate, TrainedUpdate
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
    score_tasks(components, progress, ledger, 0)
    components.progress_writer.store_clients(progress)
    ledger = checked_ledger(components, ledger, "closing header of round 0")
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
    components.progress_writer.certify(progress)
    components.progress_writer.commit(progress)


def _run_synchronous(components: RankComponents, progress: Progress) -> None:
    """Run rounds one after the other: train and exchange, as often as the method does, then settle.

    In the masked modes a round is settled by the header of the next one, after the next one's local steps,
    and the last round by a header of its own.
    """
    applied: AppliedUpdate | None = None
    while not progress.is_over:
        round = progress.round + 1 if applied is None else applied.update.round + 1
        ahead = None
        if applied is None or _goes_on(components, applied.update):
            update = round_update.begin(components, round, memory=progress.memory)
            ahead = round_update.train(components, progress, update, start=progress.state)
        sent = _settle(components, progress, applied, ahead=ahead)
        if sent is None:
            return
        applied = _apply_all(components, progress, sent)
        if not components.config.routing.sums_only:
            _settle(components, progress, applied)
            applied = None


def _apply_all(components: RankComponents, progress: Progress, sent: SentUpdate) -> AppliedUpdate:
    """Apply a round's first update, then train for and apply each further one of the round, and evaluate."""
    applied = round_update.apply(components, progress, sent)
    for exchange in range(1, components.trainer.exchanges):
        trained = round_update.train(
            components, progress, sent.update, start=progress.state, exchange=exchange
        )
        header = exchange_header(components, None, trained)
        applied = round_update.apply(components, progress, round_update.send(components, trained, header))
    _evaluate(components, progress, sent.update)
    return applied


def _run_overlapped(components: RankComponents, progress: Progress) -> None:
    """Train each round while the update of the round before is exchanged, then settle that one. If that turns
    out to be skipped, and clients keep arrays, the round is trained once more from what they kept before it,
    as a resumed run does.
    """
    if progress.is_over:
        return
    # After a resume, the first round is trained again from the state that it was trained from before.
    start = progress.state if progress.previous is None else progress.previous
    update = round_update.begin(
        components, progress.round + 1, memory=progress.memory, starts=progress.starts
    )
    ahead: TrainedUpdate | None = round_update.train(components, progress, update, start=start)
    sent = _settle(components, progress, None, ahead=ahead)
    while sent is not None:
        # Computed after the last round as well: a later run with more federation.rounds begins with these.
        starts = round_update.predicted_starts(components, progress, sent.trained)
        ahead = None
        if _goes_on(components, sent.update):
            update = round_update.begin(components, sent.round + 1, memory=sent.update.memory, starts=starts)
            ahead = round_update.train(components, progress, update, start=progress.state)
        progress.previous = progress.state
        progress.starts = starts
        applied = _apply_all(components, progress, sent)
        if ahead is not None and applied.update.skipped and components.method.keeps_memory:
            # It was trained with what clients kept of the skipped round.
            update = round_update.begin(components, sent.round + 1, memory=progress.memory, starts=starts)
            ahead = round_update.train(components, progress, update, start=progress.previous)
        sent = _settle(components, progress, applied, ahead=ahead)


def _goes_on(components: RankComponents, update: RoundUpdate) -> bool:
    """Return whether another round is trained after a round that is not settled yet."""
    return update.round < components.config.federation.rounds and not update.is_last


def _evaluate(components: RankComponents, progress: Progress, update: RoundUpdate) -> None:
    """Evaluate the state that a round's updates have led to on this rank's clients, in rounds in which that
    is due. A skipped round has not changed it.
    """
    progress.memory = update.memory
    if pacing.is_evaluated(components.config.federation, update.round) and not update.skipped:
        evaluate(components, progress, update.ledger, f"the evaluation after round {update.round}")
    if not update.skipped:
        score_tasks(components, progress, update.ledger, update.round)


def _settle(
    components: RankComponents,
    progress: Progress,
    applied: AppliedUpdate | None,
    *,
    ahead: TrainedUpdate | None = None,
) -> SentUpdate | None:
    """Finish a round whose update has been applied: decide whether to go on, send the next update, report,
    and commit.

    Args:
        applied: of the round; None where there is none to finish, before the first update.
        ahead: the next round's trained update. It is sent before the round is written down, and returned,
            unless the run turns out to be over.
    """
    is_due = applied is not None and applied.update.round % components.config.checkpoint.every == 0
    if applied is not None:
        progress.round = applied.update.round
    if is_due:
        components.progress_writer.store_clients(progress)
    header = exchange_header(components, applied.update if applied else None, ahead)
    if applied is not None and header.ledger is not None:
        components.progress_writer.note_loss(progress, held_out_loss(header.ledger))
        _decide(components, progress, applied, header.ledger)
    if progress.is_over and not is_due:
        components.progress_writer.store_clients_everywhere(progress, components.link)
    is_kept = is_due or progress.is_over
    if is_kept:
        components.progress_writer.certify(progress)
    sent = None
    if ahead is not None and not progress.is_over:
        sent = round_update.send(components, ahead, header)
    # The record precedes the commit: resuming drops a record without a commit, but could not restore one.
    if applied is not None and header.ledger is not None and components.role.reporter:
        round_update.report(components, progress, applied, header.ledger)
    if is_kept:
        components.progress_writer.commit(progress)
    return sent


def _decide(components: RankComponents, progress: Progress, applied: AppliedUpdate, ledger: Ledger) -> None:
    """Decide from the summed ledger, alike on all ranks, whether the run goes on and how updates align."""
    federation = components.config.federation
    if federation.staleness and applied.aggregate is not None:
        progress.update_alignment = overlap.update_alignment(
            applied.aggregate.state,
            applied.start,
            scale=applied.scale,
            mean_square=ledger.total("delta_square") / applied.weight,
        )
    progress.done = ending(
        progress.round, progress.stale, rounds=federation.rounds, patience=federation.patience
    )
    signals = applied.update.signals
    assert signals is not None, "the header of a round, or its ledger, has summed them"
    progress.renewed = signals.wants_renewal
    progress.stopped = signals.wants_stop

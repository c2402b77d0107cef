"""The federated rounds: ask clients, let each take its local steps from the global state, sum, apply,
evaluate, record, keep.
"""

import math

from fedspeed.errors import FedSpeedError
from fedspeed.federation import overlap, pacing, updating
from fedspeed.federation.evaluating import evaluate
from fedspeed.federation.keeping import Progress, ending
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.parts import RankParts
from fedspeed.federation.recording import held_out_loss
from fedspeed.federation.serving import server_stepped
from fedspeed.federation.updating import Update


def run(parts: RankParts, progress: Progress) -> Progress:
    """Run all rounds that are left after `baseline`, and return what the last one left: `done`, or `stopped`
    if the run was asked to end.

    Raises:
        FedSpeedError: training has diverged, or the journal cannot be written.
        LostPeerError: a participant is missing.
    """
    progress.stopped = False
    with parts.keeper:
        if progress.round:
            parts.recorder.forget()
        if parts.config.federation.staleness:
            _run_overlapped(parts, progress)
        else:
            _run_in_turn(parts, progress)
    return progress


def baseline(parts: RankParts, progress: Progress) -> None:
    """Do round 0, if it is to come yet: what the method's server makes of the first state, the held-out loss
    before any training, which the rounds have to beat, and the journal entry that makes a crash in round 1
    resumable.
    """
    if progress.round or progress.done:
        return
    if not progress.is_resumed:
        progress.state = server_stepped(parts, progress.state, round=0)
    ledger = parts.recorder.ledger()
    parts.recorder.forget()
    evaluate(parts, progress, ledger, "the evaluation before round 1")
    ledger = parts.recorder.share(ledger)
    loss = held_out_loss(ledger)
    if loss is not None and not math.isfinite(loss):
        raise FedSpeedError(
            "the held-out loss is not finite before any training; check the weights in model.base and "
            "adapter.start_from, or choose another model.dtype"
        )
    if parts.role.reporter:
        parts.recorder.record(0, (), ledger, factor_error_exact=False, clipped=0)
    if not progress.has_best:  # a run that was ended in round 1 has noted it before
        parts.keeper.note_loss(progress, loss)
    parts.keeper.keep_clients(progress, parts.link)
    parts.keeper.commit(progress)


def _run_in_turn(parts: RankParts, progress: Progress) -> None:
    """Train a round and exchange its update, as often as the method exchanges, and settle it; then the
    next.
    """
    while not progress.is_over:
        update = updating.begin(parts, progress.round + 1, start=progress.state, memory=progress.memory)
        for _ in range(parts.trainer.exchanges):
            update.start = progress.state
            updating.train(parts, progress, update)
            updating.send(parts, update)
            updating.absorb(parts, progress, update)
        _settle(parts, progress, update)


def _run_overlapped(parts: RankParts, progress: Progress) -> None:
    """Train a round while the update of the one before travels, then settle that one (see `overlap`)."""
    if progress.is_over:
        return
    # After a resume the first one is trained from what it was trained from before.
    start = progress.state if progress.previous is None else progress.previous
    update = updating.begin(
        parts, progress.round + 1, start=start, memory=progress.memory, starts=progress.starts
    )
    updating.train(parts, progress, update)
    updating.send(parts, update)
    while not progress.is_over:
        # Without a round ahead too: what one would have begun with, for a run that is made longer.
        starts = updating.predicted_starts(parts, progress, update)
        ahead = None
        if update.round < parts.config.federation.rounds:
            ahead = updating.begin(
                parts, update.round + 1, start=progress.state, memory=update.memory, starts=starts
            )
            updating.train(parts, progress, ahead)
        progress.previous = progress.state
        progress.starts = starts
        updating.absorb(parts, progress, update)
        _settle(parts, progress, update, ahead)
        update = ahead


def _settle(parts: RankParts, progress: Progress, update: Update, ahead: Update | None = None) -> None:
    """Do the rest of a round whose update is in the state: its evaluation and records.

    Args:
        ahead: the round after it, whose local steps have been taken already. Its update is sent before this
            round is written down.
    """
    progress.round = update.round
    progress.memory = update.memory
    if pacing.is_evaluated(parts.config.federation, update.round):
        evaluate(parts, progress, update.ledger, f"the evaluation after round {update.round}")
    parts.recorder.note_updates(update.ledger, update.counted)
    ledger = parts.recorder.share(update.ledger, round=update.round, training=update.training)
    parts.keeper.note_loss(progress, held_out_loss(ledger))
    _decide(parts, progress, update, ledger)
    is_kept = progress.is_over or update.round % parts.config.checkpoint.every == 0
    if is_kept:
        parts.keeper.keep_clients(progress, parts.link)
    if ahead is not None and not progress.is_over:
        updating.send(parts, ahead)
    # A record comes before its commit: without one it is dropped on resuming, the reverse would leave a gap.
    if parts.role.reporter:
        updating.record(parts, progress, update, ledger)
    if is_kept:
        parts.keeper.commit(progress)


def _decide(parts: RankParts, progress: Progress, update: Update, ledger: Ledger) -> None:
    """Decide by what all ranks told whether the run goes on, and from where."""
    federation = parts.config.federation
    if federation.staleness:
        progress.update_alignment = overlap.update_alignment(
            update.aggregate.state,
            update.start,
            scale=update.scale,
            mean_square=ledger.total("moved") / update.weight,
        )
    progress.done = ending(
        progress.round, progress.stale, rounds=federation.rounds, patience=federation.patience
    )
    progress.renewed = ledger.rank_total("renew") > ledger.rank_total("ranks") - 0.5
    progress.stopped = progress.renewed or bool(ledger.of_ranks("stop").any())

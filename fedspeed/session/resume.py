"""Resuming a run: the lock on its folder, its journal, and the state that all ranks start from."""

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedspeed.checkpoint.journal import Entry, Journal, changes
from fedspeed.config.run import RunConfig
from fedspeed.config.show import decisive
from fedspeed.errors import JournalError
from fedspeed.federation import run_progress
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.config import FederationConfig
from fedspeed.federation.folded_layout import shared_layout
from fedspeed.federation.layout import Layout
from fedspeed.federation.link import ClientLink
from fedspeed.federation.role import RankRole
from fedspeed.federation.run_progress import Progress, ending
from fedspeed.routing.state_claim import NO_BEST
from fedspeed.session.request import RunRequest
from fedspeed.session.site_resume import journal_layout, resume_site, saved_tensors

if TYPE_CHECKING:  # it loads cryptography, which a plain run does without
    from fedspeed.session.site_agreement import SiteAgreement


class RunLock:
    """An exclusive lock on a run's folder. The kernel releases it when the process ends, for whatever
    reason.
    """

    def __init__(self) -> None:
        self._descriptor = -1

    def take(self, folder: Path) -> None:
        """Lock an existing folder; do nothing if this lock has it already.

        Raises:
            JournalError: another process has locked it.
        """
        if self._descriptor >= 0 and os.path.samestat(os.fstat(self._descriptor), folder.stat()):
            return
        self.release()
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(
                f"{folder}: another process is at work on this run; wait for it or end it, or give this "
                "one its own name with run.name=..."
            ) from error
        except OSError:
            pass  # some network file systems cannot lock a folder; there no process is refused

    def release(self) -> None:
        """Release the folder, if it is locked."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def journal_of(request: RunRequest) -> Journal:
    """Return the journal of the run that is asked for, whether there is one yet or not."""
    return Journal(request.folder, request.config.checkpoint.keep)


def journal_entry(journal: Journal, request: RunRequest) -> Entry | None:
    """Return the journal's newest entry, if there is one.

    Raises:
        JournalError: it is damaged, or belongs to a run with another configuration.
    """
    entry = journal.latest()
    if entry is None or entry.fingerprint in (request.fingerprint, request.fingerprint_as(entry.config)):
        return entry
    differing = changes(decisive(entry.config), decisive(request.record)) or [
        "the content of the DeepSpeed base file"
    ]
    raise JournalError(
        f"{journal.folder}: belongs to a run with another configuration ({'; '.join(differing[:8])}); give "
        "the new one its own name with run.name=..., or start anew with --fresh"
    )


def check_best(journal: Journal, entry: Entry) -> None:
    """Check, before training, that the best round can be exported after it.

    Where the newest round is the best one, its own state is used and the file is not needed.

    Raises:
        JournalError: the file of the best round is missing or damaged.
    """
    if entry.has_best and entry.best_round != entry.round:
        journal.check_best(entry)


def end_reason(number: int, stale: int, config: FederationConfig) -> str:
    """Return why a run is over after round `number`; empty if there are more rounds.

    It is computed from the configuration and not read from the journal, because rounds and patience may have
    changed since.

    Args:
        stale: evaluations without a better held-out loss.
    """
    return ending(number, stale, rounds=config.rounds, patience=config.patience)


def resume(
    config: RunConfig,
    link: ClientLink,
    *,
    journal: Journal,
    entry: Entry | None,
    role: RankRole,
    fresh: Progress,
    agreement: "SiteAgreement | None" = None,
) -> Progress:
    """Return the progress to start from: that of the journal, or the `fresh` one. Collective over all ranks
    that carry clients.

    A job of one operator has one journal, whose rank sends it to all. Sites go on from a state that all of
    them have agreed on (`site_resume`).

    Args:
        entry: the newest entry of this rank's journal, if there is one. role: of this rank in the rounds.
        agreement: of this site with the others, on its gateway; None elsewhere.

    Raises:
        JournalError: the entry does not fit this model, or the received numbers are invalid.
        FedSpeedError: sites do not go on from the same state.
    """
    if config.routing.between_organisations:
        progress = resume_site(config, link, journal=journal, entry=entry, fresh=fresh, agreement=agreement)
    else:
        progress = _resume_job(config, link, journal, entry, fresh)
    if progress is fresh:
        return fresh
    progress.done = end_reason(progress.round, progress.stale, config.federation)
    if progress.round:
        run_progress.load_clients(config, progress, journal=journal, link=link, role=role)
    return progress


def _resume_job(
    config: RunConfig, link: ClientLink, journal: Journal, entry: Entry | None, fresh: Progress
) -> Progress:
    """Return the progress of the journal of a job of one operator, or the fresh one."""
    # Only the reporting rank has an entry. The others learn from it whether there is one.
    priority = entry.round + 1.0 if entry else 0.0
    head = link.share(np.zeros(5) if entry is None else _head(entry), priority)
    if head is None:
        return fresh
    _check_head(head)
    number = int(head[0])
    saved = (
        None if entry is None else saved_tensors(journal, entry, journal_layout(config, fresh, entry.round))
    )
    known = journal_layout(config, fresh, number)
    layout = shared_layout(link, known, None if saved is None else Layout.of(saved), priority)
    own = np.zeros(layout.size, dtype=np.float32)
    if saved is not None and Layout.of(saved) == layout:
        own = layout.flatten(saved)
    vector = link.share(own, priority)
    assert vector is not None  # the participant that has sent a head sends a vector too
    progress = _progress(head, layout.unflatten(vector))
    if entry is not None and progress.has_best and progress.best_round == number:
        journal.save_best(number, progress.state)  # `check_best` does not require the file
    return progress


def _progress(head: np.ndarray, packed: Arrays) -> Progress:
    """Return the progress that a head (see `_head`) and the tensors of an entry describe."""
    state, moments, previous = run_progress.unpack(packed)
    number = int(head[0])
    best = int(head[1])
    stale = int(head[3])
    return Progress(
        number,
        state,
        moments,
        best_round=max(0, best),
        best_loss=float("inf") if best == NO_BEST else float(head[2]),
        stale=stale,
        previous=previous if number else None,
        update_alignment=float(head[4]) if head[4] >= 0 else None,
        is_resumed=True,
    )


def _head(entry: Entry) -> np.ndarray:
    """Return the numbers of an entry that are sent with its tensors: [5] float64.

    They are the round, the best round, its loss, the evaluations since, and the alignment of updates (-1:
    none).
    """
    best = [entry.best_round, entry.best_loss] if entry.has_best else [NO_BEST, 0.0]
    return np.array([entry.round, *best, entry.stale, -1.0 if entry.likeness is None else entry.likeness])


def _check_head(head: np.ndarray) -> None:
    """Check the numbers that a participant has sent (see `_head`).

    Raises:
        JournalError: they are not possible; on all ranks.
    """
    number, best, loss, stale, _ = head.tolist()
    counts = ((number, 0), (best, NO_BEST), (stale, 0))
    if not np.isfinite(loss) or any(not count.is_integer() or count < least for count, least in counts):
        raise JournalError(
            "the participant with the newest round sent impossible numbers of its state: round "
            f"{number:g}, best round {best:g} with a loss of {loss:g}, {stale:g} evaluations since; start "
            "anew with --fresh, or without that participant's journal"
        )

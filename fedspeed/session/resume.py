"""Where a run goes on from: its folder, claimed by one process; its journal; the state that all ranks begin
with.
"""

import fcntl
import os
from pathlib import Path

import numpy as np

from fedspeed.checkpoint.journal import Entry, Journal, changes
from fedspeed.config.run import RunConfig
from fedspeed.config.show import decisive
from fedspeed.errors import JournalError
from fedspeed.federation import keeping
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.config import FederationConfig
from fedspeed.federation.folded_layout import fits, shared_layout
from fedspeed.federation.keeping import Progress, ending
from fedspeed.federation.layout import Layout
from fedspeed.federation.role import RankRole
from fedspeed.session.deployment import Deployment
from fedspeed.session.request import RunRequest

NONE = -1  # in place of the best round's number where nothing has been evaluated


class RunLock:
    """The sole right to write a run: a lock on its folder, which the kernel drops with the process, however
    that ends.
    """

    def __init__(self):
        self._held = -1

    def take(self, folder: Path) -> None:
        """RunLock a folder that is there; again and again, if need be.

        Raises:
            JournalError: another process has it.
        """
        if self._held >= 0 and os.path.samestat(os.fstat(self._held), folder.stat()):
            return
        self.drop()
        self._held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(
                f"{folder}: another process is at work on this run; wait for it or end it, or give this "
                "one its own name with run.name=..."
            ) from error
        except OSError:
            pass  # some network file systems cannot lock a folder; there nobody is refused

    def drop(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


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
    """Check that the best round so far is still there to be exported in the end: before hours of training,
    not after.

    Raises:
        JournalError: it is not. Where the newest round is the best one, its own state stands in for the file.
    """
    if entry.has_best and entry.best_round != entry.round:
        journal.check_best(entry)


def end_reason(number: int, stale: int, config: FederationConfig) -> str:
    """Return why a run that stands at round `number` is over, empty while it goes on. What the journal says
    does not count here: rounds and patience may have changed since.

    Args:
        stale: evaluations without a better held-out loss.
    """
    return ending(number, stale, rounds=config.rounds, patience=config.patience)


def resume(
    config: RunConfig,
    deployment: Deployment,
    link,
    *,
    journal: Journal,
    entry: Entry | None,
    role: RankRole,
    fresh: Progress,
) -> Progress:
    """Return the progress to go on from: the `fresh` one, or the newest journal entry that anybody
    has, told to everyone. Collective over all ranks that carry clients.

    Args:
        entry: this rank's newest one, if it has any. role: what this rank is in the rounds.

    Raises:
        JournalError: the entry does not fit this model, participants hold different states of the same
            round, or what was told is no round's.
    """
    previous = fresh.state if config.federation.staleness else None
    layout = Layout.of(keeping.pack(fresh.state, fresh.moments, previous))
    saved = None if entry is None else _saved(journal, entry, layout)
    # Sites of their own may differ by the round in which one was lost.
    priority = entry.round + 1.0 if entry else 0.0
    head = link.share(np.zeros(5) if entry is None else _head(entry), priority)
    if head is None:
        return fresh
    _check_head(head)
    layout = shared_layout(link, layout, None if saved is None else Layout.of(saved), priority)
    is_alike = saved is not None and Layout.of(saved) == layout
    own = layout.flatten(saved) if is_alike else np.zeros(layout.size, dtype=np.float32)
    vector = link.share(own, priority)
    number = int(head[0])
    best = int(head[1])
    differs = entry is not None and entry.round == number and not (is_alike and np.array_equal(own, vector))
    deployment.check_alike(link, journal, number, differs)
    progress = _progress(config, head, layout.unflatten(vector))
    if number:
        keeping.load_clients(config, progress, journal=journal, link=link, role=role)
    if best not in (NONE, number):
        deployment.share_best(link, journal, best, Layout.of(progress.state))
    if entry is not None and best == number:
        journal.save_best(best, progress.state)  # whether the file is there or not, see `check_best`
    return progress


def _progress(config: RunConfig, head: np.ndarray, packed: Arrays) -> Progress:
    """Return the progress that a head (see `_head`) and the tensors of an entry tell of."""
    state, moments, previous = keeping.unpack(packed)
    number = int(head[0])
    best = int(head[1])
    stale = int(head[3])
    return Progress(
        number,
        state,
        moments,
        best_round=max(0, best),
        best_loss=float("inf") if best == NONE else float(head[2]),
        stale=stale,
        done=end_reason(number, stale, config.federation),
        previous=previous if number else None,
        update_alignment=float(head[4]) if head[4] >= 0 else None,
        is_resumed=True,
    )


def _saved(journal: Journal, entry: Entry, layout: Layout) -> dict[str, np.ndarray]:
    saved = journal.tensors(entry)
    if not fits(Layout.of(saved), layout):
        raise JournalError(f"{journal.folder}: its tensors do not fit this model; start anew with --fresh")
    return saved


def _head(entry: Entry) -> np.ndarray:
    """Return what is told of an entry beside its tensors: round, best round and its loss, evaluations without
    a better one, how far updates were alike [5].
    """
    best = [entry.best_round, entry.best_loss] if entry.has_best else [NONE, 0.0]
    return np.array([entry.round, *best, entry.stale, -1.0 if entry.likeness is None else entry.likeness])


def _check_head(head: np.ndarray) -> None:
    """Check what a participant has told of its entry (see `_head`).

    Raises:
        JournalError: no round is like that; on all ranks alike.
    """
    number, best, loss, stale, _ = head.tolist()
    counts = ((number, 0), (best, NONE), (stale, 0))
    if not np.isfinite(loss) or any(not count.is_integer() or count < least for count, least in counts):
        raise JournalError(
            "the state to go on from, as the participant with the newest round tells it: it is of round "
            f"{number:g}, the best one is {best:g} with a loss of {loss:g}, and {stale:g} evaluations since "
            "were no better, which is no round's; start anew with --fresh, or without that participant's "
            "journal"
        )

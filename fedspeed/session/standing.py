"""Where a run stands: its folder, claimed by one process; its journal; the state that all ranks go on from."""

import fcntl
import os
from pathlib import Path

import numpy as np

from fedspeed.checkpoint.journal import Entry, Journal, changes
from fedspeed.config.run import RunConfig
from fedspeed.config.show import decisive
from fedspeed.errors import JournalError
from fedspeed.federation import keeping
from fedspeed.federation.config import FederationConfig
from fedspeed.session.order import Order

NONE = -1  # in place of the best round's number where nothing has been evaluated


class Claim:
    """The sole right to write a run: a lock on its folder, which the kernel drops with the process, however that ends."""

    def __init__(self):
        self._held = -1

    def take(self, folder: Path) -> None:
        """Claim a folder that is there; again and again, if need be.

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
            raise JournalError(f"{folder}: another process is at work on this run; wait for it or end it, or give this one its own name "
                               "with run.name=...") from error
        except OSError:
            pass  # some network file systems cannot lock a folder; there nobody is refused

    def drop(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


def journal_of(order: Order) -> Journal:
    return Journal(order.folder, order.config.checkpoint.keep)


def journal_entry(journal: Journal, order: Order) -> Entry | None:
    """The journal's newest entry, if there is one.

    Raises:
        JournalError: it is damaged, or belongs to a run with another configuration.
    """
    entry = journal.latest()
    if entry is None or entry.fingerprint in (order.marks, order.marks_as(entry.config)):
        return entry
    differing = changes(decisive(entry.config), decisive(order.record)) or ["the content of the DeepSpeed base file"]
    raise JournalError(f"{journal.folder}: belongs to a run with another configuration ({'; '.join(differing[:8])}); give the new one its "
                       "own name with run.name=..., or start anew with --fresh")


def check_best(journal: Journal, entry: Entry) -> None:
    """That the best round so far is still there to be exported in the end: found before hours of training, not behind them.

    Raises:
        JournalError: it is not. Where the newest round is the best one, its own state stands in for the file.
    """
    if entry.has_best and entry.best_round != entry.round:
        journal.check_best(entry)


def ending(number: int, stale: int, config: FederationConfig) -> str:
    """Why a run that stands at round `number` is over, empty while it goes on. The journal's word does not count here: rounds and
    patience may have changed since."""
    return keeping.ending(number, stale, rounds=config.rounds, patience=config.patience)


def resume(config: RunConfig, engine, link, journal: Journal, entry: Entry | None, role, fresh):
    """The `keeping.Progress` to go on from: the `fresh` one, or the newest journal entry that anybody has, told to everyone."""
    from fedspeed.federation.folded_layout import fits, shared_layout
    from fedspeed.federation.layout import Layout

    packed = keeping.pack(fresh.state, fresh.moments, fresh.state if config.federation.staleness else None)
    layout, head, saved = Layout.of(packed), np.zeros(5), None
    if entry is not None:
        saved = journal.tensors(entry)
        if not fits(Layout.of(saved), layout):
            raise JournalError(f"{journal.folder}: its tensors do not fit this model; start anew with --fresh")
        head = np.array([entry.round, entry.best_round if entry.has_best else NONE, entry.best_loss if entry.has_best else 0.0, entry.stale,
                         -1.0 if entry.likeness is None else entry.likeness])
    priority = entry.round + 1.0 if entry else 0.0  # sites of their own may differ by the round in which one was lost
    head = link.share(head, priority)
    if head is None:
        return fresh
    own_layout = Layout.of(saved) if saved else None
    layout = shared_layout(link, layout, own_layout, priority)
    alike = saved is not None and own_layout == layout
    own = layout.flatten(saved) if alike else np.zeros(layout.size, dtype=np.float32)
    vector = link.share(own, priority)
    if config.routing.transport == "tls":
        _check_alike(link, journal, int(head[0]), entry is not None and entry.round == head[0] and not (alike and np.array_equal(own, vector)))
    state, moments, previous = keeping.unpack(layout.unflatten(vector))
    number, best, stale = int(head[0]), int(head[1]), int(head[3])
    progress = keeping.Progress(
        number,
        state,
        moments,
        best_round=max(0, best),
        best_loss=float("inf") if best == NONE else float(head[2]),
        stale=stale,
        done=ending(number, stale, config.federation),
        previous=previous if number else None,
        update_alignment=float(head[4]) if head[4] >= 0 else None,
    )
    if number:
        keeping.load_clients(config, progress, journal=journal, link=link, role=role)
    if best not in (NONE, number) and config.routing.transport == "tls":
        _share_best(link, journal, best, Layout.of(state))
    if entry is not None and best == number:
        journal.save_best(best, state)  # whether the file is there or not, see `check_best`
    return progress


def _check_alike(link, journal: Journal, number: int, differs: bool) -> None:
    """Sites that have the round that is offered must have that very state of it: one site alone cannot put another one in its place.

    Raises:
        JournalError: on all sites, if one objects.
    """
    if link.share(np.ones(1), float(differs)) is not None:
        raise JournalError(f"{journal.folder}: the sites hold different states of round {number}; {'this one differs' if differs else 'another differs'} from "
                           "what was offered. Compare the journals; a site whose folder is moved aside takes the others' state")


def _share_best(link, journal: Journal, best: int, layout) -> None:
    """Give the best round's tensors to sites that do not have them."""
    from fedspeed.federation.folded_layout import shared_layout

    try:
        own = journal.load_best(best)
    except JournalError:
        own = None
    known = float(own is not None)
    layout = shared_layout(link, layout, layout.of(own) if own else None, known)
    told = link.share(layout.flatten(own) if own else np.zeros(layout.size, dtype=np.float32), known)
    if told is None:
        raise JournalError(f"{journal.folder}: no site has the tensors of round {best}, the best one so far; start anew with --fresh on all")
    if own is None:
        journal.save_best(best, layout.unflatten(told))

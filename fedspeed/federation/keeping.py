"""What a run keeps of its rounds: the state that a round changes, and how it is written down.

The journal's names of arrays: `global/NAME`, `server/MOMENT/NAME` and `previous/NAME` in a round's state; in
a client's own file its optimizer, or its start under staleness, by their own names, its memory as
`memory/NAME`, and what that was in the best round, if it is another one, as `best/NAME`.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.run import RunConfig
from fedspeed.federation import server
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.link import ClientLink
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.federation.role import RankRole

MEMORY = "memory/"
BEST = "best/"


@dataclass
class Progress:
    """All that a round changes, and the journal keeps but for the last three.

    Attributes:
        round: the last one that is finished, 0 before the first.
        state: global arrays by name. moments: of the server optimizer.
        optimizers: of this rank's clients, where they are kept. memory: what each of them alone goes on with.
        best_memory: what that was in the best round.
        best_round: 0 is the start, if best_loss is finite: else there is none yet.
        stale: evaluations since then.
        done: why the run is over, empty while it is not.
        previous: under staleness, the state that the round under way is trained from.
        starts: under staleness, what each of this rank's clients goes on from itself.
        update_alignment: under staleness, how far clients' updates were alike in the last round (see
            `federation.overlap`).
        stopped: whether this process is to end before the run is over. renewed: whether all have a newer list
            of participants, and the run is to be started again with it.
        is_resumed: whether the state that this process began with is a journal's: that of round 0 has had the
            step of the method's server.
    """

    round: int
    state: Arrays
    moments: server.State
    optimizers: dict[int, Arrays] = field(default_factory=dict)
    memory: dict[int, Arrays] = field(default_factory=dict)
    best_memory: dict[int, Arrays] = field(default_factory=dict)
    best_round: int = 0
    best_loss: float = math.inf
    stale: int = 0
    done: str = ""
    previous: Arrays | None = None
    starts: dict[int, Arrays] = field(default_factory=dict)
    update_alignment: float | None = None
    stopped: bool = False
    renewed: bool = False
    is_resumed: bool = False

    @property
    def has_best(self) -> bool:
        """Say whether any round, or the start, has been evaluated."""
        return math.isfinite(self.best_loss)

    @property
    def is_over(self) -> bool:
        """Say whether no further round is to be run by this process."""
        return bool(self.done) or self.stopped


def ending(round: int, stale: int, *, rounds: int, patience: int) -> str:
    """Return why a run that stands at a round is over, empty while it goes on.

    Args:
        stale: evaluations without a better loss. rounds, patience: of the configuration (federation.rounds,
            federation.patience).
    """
    if round >= rounds:
        return "finished"
    return "early stop" if patience and stale >= patience else ""


def pack(state: Arrays, moments: server.State, previous: Arrays | None = None) -> Arrays:
    """Return the global state, the server optimizer's moments, and under staleness the state before, under
    one set of names, for the journal.
    """
    packed = {f"global/{name}": array for name, array in state.items()}
    for moment, arrays in moments.items():
        packed |= {f"server/{moment}/{name}": array for name, array in arrays.items()}
    return packed | {f"previous/{name}": array for name, array in (previous or {}).items()}


def unpack(packed: Arrays) -> tuple[Arrays, server.State, Arrays | None]:
    """Return (state, moments, previous) of what `pack` made."""
    state: Arrays = {}
    previous: Arrays = {}
    moments: server.State = {}
    for name, array in packed.items():
        kind, rest = name.split("/", 1)
        if kind == "global":
            state[rest] = array
        elif kind == "previous":
            previous[rest] = array
        else:
            moment, rest = rest.split("/", 1)
            moments.setdefault(moment, {})[rest] = array
    return state, moments, previous or None


def keeps_starts(config: RunConfig) -> bool:
    """Say whether what clients go on from under staleness is kept with the journal, so that a resumed run is
    the same one.

    It tells a client's own update, and so stays in memory where that is a secret: then the first round after
    a resume is trained from what was common.
    """
    return bool(config.federation.staleness) and not config.routing.sums_only


def keeps_clients(config: RunConfig, method: type[Method]) -> bool:
    """Say whether clients have files of their own in the journal."""
    return config.federation.local_optimizer == "keep" or keeps_starts(config) or method.keeps_memory


def pack_client(config: RunConfig, progress: Progress, client: int) -> Arrays:
    """Return what a client alone goes on with, for its own file; empty for one that was never asked."""
    keeps_optimizer = config.federation.local_optimizer == "keep"
    own: Arrays = {}
    if keeps_optimizer:
        own = progress.optimizers.get(client, {})
    elif keeps_starts(config):
        own = progress.starts.get(client, {})
    packed = own | {f"{MEMORY}{name}": array for name, array in progress.memory.get(client, {}).items()}
    if progress.best_round == progress.round:
        return packed
    best = progress.best_memory.get(client, {})
    return packed | {f"{BEST}{name}": array for name, array in best.items()}


def unpack_client(config: RunConfig, progress: Progress, client: int, packed: Arrays) -> None:
    """Put what `pack_client` made back into `progress`."""
    own = {name: array for name, array in packed.items() if not name.startswith((MEMORY, BEST))}
    if own:
        kept = progress.optimizers if config.federation.local_optimizer == "keep" else progress.starts
        kept[client] = own
    if memory := _named(packed, MEMORY):
        progress.memory[client] = memory
    if best := memory if progress.best_round == progress.round else _named(packed, BEST):
        progress.best_memory[client] = best


def _named(packed: Arrays, kind: str) -> Arrays:
    """Return the arrays of one kind by their own names."""
    return {name.removeprefix(kind): array for name, array in packed.items() if name.startswith(kind)}


def load_clients(
    config: RunConfig, progress: Progress, *, journal: Journal, link: ClientLink, role: RankRole
) -> None:
    """Read what a rank's clients alone go on with from their gateway's disk, on all their ranks. Collective.

    Raises:
        JournalError: a client's file is missing or damaged.
    """
    if not keeps_clients(config, method_class(config.federation.method.name)):
        return
    for client in role.clients:
        packed = journal.load_client(progress.round, client) if role.gateway else None
        unpack_client(config, progress, client, link.arrays_from_gateway(packed))
    link.sum(
        np.zeros(1), 0.0
    )  # a rank that cannot read its own has gone by now, and nothing of the run is changed yet


class Keeper:
    """Writes down what rounds leave, on the ranks whose part it is. A context: a commit under way is waited
    for at its end.

    Args:
        fingerprint, record: of the run's configuration, for the journal (checkpoint.journal.Entry).
    """

    def __init__(
        self,
        config: RunConfig,
        role: RankRole,
        journal: Journal | None,
        *,
        method: Method,
        fingerprint: str,
        record: dict,
    ):
        self._config = config
        self._role = role
        self._journal = journal
        self._method = method
        self._fingerprint = fingerprint
        self._record = record
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future | None = None

    def __enter__(self) -> "Keeper":
        self._writer = ThreadPoolExecutor(1, "journal")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._writer.shutdown()
        self._writer = None
        if kind is None:
            self.wait()

    def note_loss(self, progress: Progress, loss: float | None) -> None:
        """Keep the best state by held-out loss, the start being one, and count evaluations without a better
        one.

        Args:
            loss: of `progress.state`, None if it was not evaluated.
        """
        if loss is None:
            return
        if not loss < progress.best_loss:  # neither is a loss that is no number
            progress.stale += 1
            return
        progress.best_loss = loss
        progress.best_round = progress.round
        progress.stale = 0
        progress.best_memory = dict(progress.memory)
        if self._role.reporter:
            self._journal.save_best(progress.round, progress.state)

    def keep_clients(self, progress: Progress, link: ClientLink) -> None:
        """Write what clients alone go on with: on disk everywhere before the reporter makes the round
        count.
        """
        if not keeps_clients(self._config, type(self._method)):
            return
        if self._role.gateway:
            for client in self._role.clients:  # one that was never asked has none, which is no lost file
                self._journal.save_client(progress.round, client, pack_client(self._config, progress, client))
        link.sum(np.zeros(1), 0.0)

    def commit(self, progress: Progress) -> None:
        """Make the round count. Under staleness that goes on beside the next round's training: writing is
        waiting, and nothing changes these arrays.
        """
        if not self._role.reporter:
            return
        entry = Entry(
            progress.round,
            self._fingerprint,
            self._config.run.seed,
            config=self._record,
            best_round=progress.best_round,
            best_loss=progress.best_loss,
            stale=progress.stale,
            done=progress.done,
            likeness=progress.update_alignment,
        )
        packed = pack(progress.state, progress.moments, progress.previous)
        if self._config.federation.staleness and self._writer is not None:
            self._writing = self._writer.submit(self._journal.commit, entry, packed)
        else:
            self._journal.commit(entry, packed)

    def wait(self) -> None:
        """Wait for a commit under way. Raises what it has failed with."""
        if self._writing is not None:
            written = self._writing
            self._writing = None
            written.result()

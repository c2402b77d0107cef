"""The progress of a run, which every round changes, and how it is written to the journal.

Names of arrays in the journal: a round's state has `global/NAME`, `server/MOMENT/NAME` and `previous/NAME`. A
client's own file has its optimizer, or under staleness its start, without a prefix; its memory as
`memory/NAME`; and its memory in the best round, if that is another round, as `best/NAME`.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspeed import activity
from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.run import RunConfig
from fedspeed.federation import server_optimizer
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.link import ClientLink
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.federation.packed_tensors import tensors_digest
from fedspeed.federation.role import RankRole
from fedspeed.federation.witness import StateCertifier
from fedspeed.routing.state_claim import NO_BEST, NO_TENSORS, StateClaim, TensorsDigest

MEMORY = "memory/"
BEST = "best/"


@dataclass
class Progress:
    """Hold everything that a round changes. The journal stores all of it except the last four attributes.

    Attributes:
        round: the last finished round, 0 before the first.
        state: global arrays by name. moments: of the server optimizer.
        optimizers: states of local optimizers by client of this rank, under federation.local_optimizer=keep.
        memory: by client of this rank, the arrays that only this client keeps (`Turn.memory`).
        best_memory: `memory` in the best round.
        best_round: the round with the lowest held-out loss; 0 is the start. Valid if `has_best`.
        stale: number of evaluations since the best round.
        done: why the run is over; empty while it is not.
        previous: under staleness, the state that the round in progress is trained from.
        starts: under staleness, the predicted state that each of this rank's clients starts from.
        update_alignment: under staleness, the alignment of the last round's updates (`federation.overlap`).
        stopped: whether this process is to end before the run is over.
        renewed: whether all processes have a newer roster, and the run is to be restarted with it.
        best_digest: between organisations, of the state of the best round.
        is_resumed: whether this process began from a journal. Its state of round 0 includes the first step of
            the method's server.
    """

    round: int
    state: Arrays
    moments: server_optimizer.State
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
    best_digest: TensorsDigest = NO_TENSORS
    is_resumed: bool = False

    @property
    def has_best(self) -> bool:
        """Return whether any round, or the start, has been evaluated."""
        return math.isfinite(self.best_loss)

    @property
    def is_over(self) -> bool:
        """Return whether this process is to run no further round."""
        return bool(self.done) or self.stopped


def ending(round: int, stale: int, *, rounds: int, patience: int) -> str:
    """Return why a run is over after a round; empty while it goes on.

    Args:
        stale: evaluations without a better loss.
        rounds, patience: the settings federation.rounds and federation.patience.
    """
    if round >= rounds:
        return "finished"
    return "early stop" if patience and stale >= patience else ""


def pack(state: Arrays, moments: server_optimizer.State, previous: Arrays | None = None) -> Arrays:
    """Return all arrays of a round's state under the journal's names.

    Args:
        moments: of the server optimizer. previous: the state before, under staleness.
    """
    packed = {f"global/{name}": array for name, array in state.items()}
    for moment, arrays in moments.items():
        packed |= {f"server/{moment}/{name}": array for name, array in arrays.items()}
    return packed | {f"previous/{name}": array for name, array in (previous or {}).items()}


def unpack(packed: Arrays) -> tuple[Arrays, server_optimizer.State, Arrays | None]:
    """Return (state, moments, previous) from the arrays that `pack` returned."""
    state: Arrays = {}
    previous: Arrays = {}
    moments: server_optimizer.State = {}
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


def claim_of(progress: Progress, run: bytes, state: TensorsDigest) -> StateClaim:
    """Return what the sites sign of a round.

    Args:
        run: digest of the session in which the run began. state: of all arrays of the round (`pack`).
    """
    return StateClaim(
        run=run,
        round=progress.round,
        state=state,
        best_round=progress.best_round if progress.has_best else NO_BEST,
        best_loss=progress.best_loss if progress.has_best else 0.0,
        best=progress.best_digest,
        stale=progress.stale,
        alignment=progress.update_alignment,
    )


def stores_starts(config: RunConfig) -> bool:
    """Return whether clients' predicted starts are written to the journal, so that a resumed run computes the
    same as an uninterrupted one.

    A start reveals the client's own update. In the masked modes, where that is secret, it stays in memory,
    and the first round after a resume starts from the common state.
    """
    return bool(config.federation.staleness) and not config.routing.sums_only


def stores_clients(config: RunConfig, method: type[Method]) -> bool:
    """Return whether each client has a file of its own in the journal."""
    return config.federation.local_optimizer == "keep" or stores_starts(config) or method.keeps_memory


def pack_client(config: RunConfig, progress: Progress, client: int) -> Arrays:
    """Return the arrays of a client's own file; empty for a client that was never sampled."""
    unprefixed: Arrays = {}
    if config.federation.local_optimizer == "keep":
        unprefixed = progress.optimizers.get(client, {})
    elif stores_starts(config):
        unprefixed = progress.starts.get(client, {})
    packed = unprefixed | {
        f"{MEMORY}{name}": array for name, array in progress.memory.get(client, {}).items()
    }
    if progress.best_round == progress.round:
        return packed
    best = progress.best_memory.get(client, {})
    return packed | {f"{BEST}{name}": array for name, array in best.items()}


def unpack_client(config: RunConfig, progress: Progress, client: int, packed: Arrays) -> None:
    """Put the arrays that `pack_client` returned back into `progress`."""
    unprefixed = {name: array for name, array in packed.items() if not name.startswith((MEMORY, BEST))}
    if unprefixed:
        by_client = progress.optimizers if config.federation.local_optimizer == "keep" else progress.starts
        by_client[client] = unprefixed
    memory = _with_prefix(packed, MEMORY)
    if memory:
        progress.memory[client] = memory
    best = memory if progress.best_round == progress.round else _with_prefix(packed, BEST)
    if best:
        progress.best_memory[client] = best


def _with_prefix(packed: Arrays, prefix: str) -> Arrays:
    """Return the arrays whose names have a prefix, under the names without it."""
    return {name.removeprefix(prefix): array for name, array in packed.items() if name.startswith(prefix)}


def load_clients(
    config: RunConfig, progress: Progress, *, journal: Journal, link: ClientLink, role: RankRole
) -> None:
    """Read the files of a rank's clients on their gateway, and give the arrays to all ranks of the clients.
    Collective over all ranks.

    Raises:
        JournalError: a client's file is missing or damaged.
        LostPeerError: another participant could not read its files.
    """
    if not stores_clients(config, method_class(config.federation.method.name)):
        return
    for client in role.clients:
        packed = journal.load_client(progress.round, client) if role.gateway else None
        unpack_client(config, progress, client, link.arrays_from_gateway(packed))
    # A barrier: if a rank could not read its files, all ranks end here, before the run has changed anything.
    link.sum(np.zeros(1), 0.0)


class ProgressWriter:
    """Writes the progress to the journal: the reporter writes rounds and the best state, gateways write their
    clients' files. Used as a context manager, it finishes a background commit on exit.

    Args:
        fingerprint, record: of the run's configuration, for the journal (checkpoint.journal.Entry).
        certifier: between organisations, on the gateway of a site; None elsewhere.
    """

    def __init__(
        self,
        config: RunConfig,
        role: RankRole,
        journal: Journal,
        *,
        method: Method,
        fingerprint: str,
        record: dict[str, Any],
        certifier: StateCertifier | None = None,
    ):
        self._config = config
        self._role = role
        self._journal = journal
        self._method = method
        self._fingerprint = fingerprint
        self._record = record
        self._certifier = certifier
        self._certified = (-1, b"")  # the last round that was signed, and its certificate
        self._writer: ThreadPoolExecutor | None = None
        self._commit_in_progress: Future[None] | None = None

    def __enter__(self) -> "ProgressWriter":
        self._writer = ThreadPoolExecutor(1, "journal")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        assert self._writer is not None, "the keeper was entered"
        self._writer.shutdown()
        self._writer = None
        if kind is None:
            self.wait()

    def note_loss(self, progress: Progress, loss: float | None) -> None:
        """Save the state if its held-out loss is the lowest so far, else count one more stale evaluation.

        Args:
            loss: of `progress.state`, None if it was not evaluated.
        """
        if loss is None:
            return
        if not loss < progress.best_loss:  # NaN counts as stale too
            progress.stale += 1
            return
        progress.best_loss = loss
        progress.best_round = progress.round
        progress.stale = 0
        progress.best_memory = dict(progress.memory)
        if self._certifier is not None:
            progress.best_digest = tensors_digest(progress.state)
        if self._role.reporter:
            self._journal.save_best(progress.round, progress.state)

    def store_clients(self, progress: Progress) -> None:
        """Write the files of this rank's clients. They are on disk on all hosts once an exchange that begins
        after this has finished; only then may the reporter commit the round.
        """
        if not (stores_clients(self._config, type(self._method)) and self._role.gateway):
            return
        for client in self._role.clients:  # no file is written for a client that was never sampled
            self._journal.save_client(progress.round, client, pack_client(self._config, progress, client))

    def store_clients_everywhere(self, progress: Progress, link: ClientLink) -> None:
        """Write the files of this rank's clients, and wait until they are on disk on all hosts. Collective
        over all ranks.
        """
        self.store_clients(progress)
        if stores_clients(self._config, type(self._method)):
            link.sum(np.zeros(1), 0.0, label=f"the files of clients in round {progress.round}")

    def certify(self, progress: Progress) -> None:
        """Have all sites sign the state of a round that is about to be committed; do nothing in a job of one
        operator. No exchange may be under way. Collective over the sites.

        Raises:
            FedSpeedError: a site has another state, or has not signed it; names it.
            LostPeerError: a site is missing.
        """
        if self._certifier is not None:
            with activity.during(f"the signatures of round {progress.round}"):
                state = tensors_digest(pack(progress.state, progress.moments, progress.previous))
                certificate = self._certifier.certify(claim_of(progress, self._certifier.run, state))
            self._certified = (progress.round, certificate)

    def commit(self, progress: Progress) -> None:
        """Commit the round to the journal, on the reporter; between organisations after `certify`. Under
        staleness this happens in the background, during the next round's local steps, which do not change
        these arrays.

        Raises:
            FedSpeedError: the journal cannot be written; from a background commit, `wait` raises it.
        """
        if not self._role.reporter:
            return
        certificate = b""
        if self._certifier is not None:
            certified_round, certificate = self._certified
            assert certified_round == progress.round, "a site commits no round that is not signed"
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
            certificate=certificate.hex(),
        )
        packed = pack(progress.state, progress.moments, progress.previous)
        if self._config.federation.staleness and self._writer is not None:
            self._commit_in_progress = self._writer.submit(self._journal.commit, entry, packed)
        else:
            self._journal.commit(entry, packed)

    def wait(self) -> None:
        """Wait for a background commit, and raise the error that it failed with."""
        if self._commit_in_progress is not None:
            commit = self._commit_in_progress
            self._commit_in_progress = None
            commit.result()

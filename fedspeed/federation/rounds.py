"""The federated round: ask clients, let each take its local steps from the global state, sum, apply, evaluate, keep."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.run import RunConfig
from fedspeed.data.batches import client_step, eval_batches
from fedspeed.data.clients import ClientData
from fedspeed.data.config import local_steps_of
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.errors import FedSpeedError
from fedspeed.federation import rules, server
from fedspeed.federation.layout import Layout
from fedspeed.federation.ledger import CLIENT_WORDS, Ledger
from fedspeed.federation.link import ClientLink, Started
from fedspeed.federation.schedule import lr_at, sample
from fedspeed.monitor.records import ClientRecord, RoundRecord

Tensors = dict[str, np.ndarray]
FIRST_STEPS = 2  # of a run with a budget of seconds, before it knows how long a step takes
ENDINGS = ("", "finished", "early stop")  # of `Progress.done`


@dataclass(frozen=True)
class Seat:
    """What this rank is in the run.

    Attributes:
        clients: data of the clients this rank carries, by client number; all ranks of a client carry the same.
        slot, ranks: this rank's place among the ranks that work, and their number.
        gateway: whether this rank speaks for its clients. reporter: whether it commits the journal and reports (exactly one rank does).
        cluster: name of the cluster, which may have its own number of local steps.
    """

    clients: dict[int, ClientData]
    slot: int
    ranks: int
    gateway: bool
    reporter: bool
    cluster: str


@dataclass
class Progress:
    """All that a round changes; what the journal keeps."""

    round: int
    tensors: Tensors
    server: server.State
    optimizers: dict[int, Tensors] = field(default_factory=dict)
    best_round: int = 0
    best_loss: float = math.inf
    stale: int = 0
    done: str = ""
    previous: Tensors | None = None  # under staleness: the state that the round under way is trained from
    starts: dict[int, Tensors] = field(default_factory=dict)  # and of this rank's clients, what each goes on from itself


@dataclass
class Trained:
    """A round whose local steps are taken and whose updates are not summed yet."""

    number: int
    start: Tensors
    rule: Any
    still: frozenset[str]
    ledger: Ledger
    asked: tuple[int, ...]
    vector: np.ndarray
    weight: float
    steps: int
    starts: dict[int, Tensors]
    begin: float
    started: Started | None = None
    sent: float = 0.0  # when its update was


class Federation:
    """One rank's part in a federated run. Every rank of every client runs the same rounds; see `Seat` for what differs.

    Args:
        stop: asked at the end of every round; True once the scheduler wants this process to end.
        renew: asked likewise; True once this process has a newer list of participants. When all have, the run stops, to be started again with it.
    """

    def __init__(self, config: RunConfig, fingerprint: str, config_dict: dict, seat: Seat, engine: ClientEngine, link: ClientLink,
                 journal: Journal, monitor, clock, peak_bytes: Callable[[], int], stop: Callable[[], bool],
                 renew: Callable[[], bool] = lambda: False):
        self.config, self._fingerprint, self._config_dict = config, fingerprint, config_dict
        self.seat, self.engine, self._link = seat, engine, link
        self._journal, self._monitor, self._clock, self._peak_bytes, self._stop = journal, monitor, clock, peak_bytes, stop
        self.steps_per_round = local_steps_of(config.train, seat.cluster)
        # A client counts by the answer tokens of its training rows.
        self._weights = {c: float(sum(e.answer_tokens for e in d.train)) for c, d in seat.clients.items()}
        self._renew, self.renewed = renew, False
        # Clients that take different numbers of steps are weighed as if all had taken as many (see `_evened`).
        self._uneven = config.federation.aggregation != "svd" and bool(config.train.local_steps_by_cluster or config.federation.round_budget == "seconds")
        self._whole = 0.0  # under staleness: the weights of all clients together
        self._moved: dict[int, Tensors] = {}  # and what each client's last local steps have changed
        self._held: frozenset[str] = frozenset()  # in them
        self._step_s: float | None = None  # seconds of a local step of all this rank's clients, in the last round
        self._overlapped: dict[str, float] = {}  # seconds of this round's exchange, and of waiting for it
        self._seconds: dict[str, float] = {}  # of this round's turns so far
        self._settled = 0.0  # when the last round was
        self._writing: Future | None = None  # under staleness: the commit of the last round

    def run(self, progress: Progress) -> Progress:
        """Run all rounds that are left; returns what the last one left. `done` says why the run is over, empty if it was asked to stop."""
        with ThreadPoolExecutor(1, "journal") as self._writer:
            done = self._run(progress)
            self._await_commit()
            return done

    def _run(self, progress: Progress) -> Progress:
        if progress.round == 0 and not progress.done:
            self._baseline(progress)
        self._layout = Layout.of(progress.tensors)
        stale, pending, rounds = self.config.federation.staleness, None, self.config.federation.rounds
        if stale:
            self._whole = self._link.sum(np.zeros(1), sum(self._weights.values())).weight
        number = progress.round
        while not progress.done:
            if number < rounds:
                number += 1
                # The first one after a resume is trained from what it was trained from before.
                resumed = pending is None and stale and progress.previous is not None
                starts = progress.starts if resumed else self._foreseen(progress) if pending is not None else {}
                trained = self._train_round(progress, number, progress.previous if resumed else progress.tensors, starts)
            else:
                trained = None
            if pending is None:
                self._send(trained)
            elif self._settle_round(progress, pending, trained):
                break
            pending = trained
            if not stale and pending is not None:
                if self._settle_round(progress, pending):
                    break
                pending = None
        return progress

    def _baseline(self, progress: Progress) -> None:
        """Round 0: the held-out loss before any training, and the journal entry that makes a crash in round 1 resumable.

        The loss is only shown: the best round is one of those that trained.
        """
        ledger, begin = self._ledger(), time.perf_counter()
        self._clock.snapshot_and_reset()
        self._evaluate(progress.tensors, ledger)
        ledger = self._share(ledger)
        if not math.isfinite(ledger.of_clients("val_loss").sum()):
            raise FedSpeedError("the held-out loss is not finite before any training; check the weights in model.base and adapter.start_from, "
                                "or choose another model.dtype")
        if self.seat.reporter:
            self._monitor.round(self._record(0, (), ledger, time.perf_counter() - begin, None, None))
        self._keep_clients(progress)
        self._commit(progress)

    def _foreseen(self, progress: Progress) -> dict[int, Tensors]:
        """Under staleness, what each client goes on from while its update is still under way: the state with its own part of the sum.

        What the others bring is a round late; a client's own part it knows. Without it a client would take its next steps as if it had not taken the last ones,
        and such a delay alone makes a step size unstable at half of what it bears in time. A client that went on from its whole change, as DaSGD (Zhou et al.,
        2020) and Overlap Local-SGD (Wang et al., 2020) do where data are alike, would drift to its own optimum where they are not. When the aggregate comes, it
        takes the place of what was foreseen: only changes are summed. For server optimizers too.
        """
        asked = (self.config.federation.clients_per_round or self.config.data.clients) / self.config.data.clients

        def ahead(client: int, change: Tensors) -> Tensors:
            share = min(1.0, self._weights[client] / (self._whole * asked)) if self._whole else 1.0
            target = {n: (x + share * change[n]).astype(np.float32) for n, x in progress.tensors.items()}
            return server.update(self.config.federation, progress.server, progress.tensors, target, self._held)[1]

        return {client: ahead(client, change) for client, change in self._moved.items()}

    def _train_round(self, progress: Progress, number: int, start: Tensors, starts: dict[int, Tensors]) -> Trained:
        """A round's local steps, from the state `start`; clients that are in `starts` begin there."""
        config, begin = self.config, time.perf_counter()
        self._clock.trace.round(number)
        ledger = self._ledger()
        rule = rules.make_rule(config.federation.aggregation, self._layout, config.data.clients, config.run.seed, number)
        still = rules.held(config.federation.aggregation, number, self._layout.names)
        asked = sample(config.run.seed, number, config.data.clients, config.federation.clients_per_round)
        self._clock.snapshot_and_reset()

        steps = self._steps()
        vector, weight = self._train(progress, start, starts, number, steps, asked, rule, still, ledger)
        return Trained(number, start, rule, still, ledger, asked, vector, weight, steps, starts, begin)

    def _send(self, trained: Trained) -> None:
        trained.sent = time.perf_counter()
        trained.started = self._link.start(trained.vector, trained.weight)

    def _steps(self) -> int:
        """How many local steps this rank's clients take in the next round."""
        federation = self.config.federation
        if federation.round_budget == "steps":
            return self.steps_per_round
        fitting = FIRST_STEPS if self._step_s is None else int(federation.round_seconds / self._step_s)
        return self.engine.agree_least(max(1, min(self.steps_per_round, fitting)))

    def _evened(self, trained: Trained) -> float:
        """What the mean change is multiplied by: the mean number of local steps, of the number that all changes have been brought to.

        A client that takes more steps moves further, and would count for more than its rows do. So changes are summed for each step, and multiplied by the
        mean number of steps (FedNova; Wang et al., NeurIPS 2020).
        """
        if not self._uneven:
            return 1.0
        weight, steps = self._link.sum(np.array([trained.weight, trained.weight * trained.steps]), 0.0).vector
        return float(steps / weight / self.config.train.local_steps)

    def _settle_round(self, progress: Progress, trained: Trained, ahead: Trained | None = None) -> bool:
        """The rest of a round: its sum, what it does to the state, its evaluation and records. True if the run is to stop here.

        Args:
            ahead: the round after it, whose local steps have been taken already. Its update is sent before this round is written down.
        """
        config, number, ledger, still = self.config, trained.number, trained.ledger, trained.still
        waited = time.perf_counter()
        total = self._link.finish(trained.started)
        waited = time.perf_counter() - waited
        self._await_commit()  # of the round before: it clears away what no round needs
        self._clock.trace.span("exchange", f"exchange of round {number}", trained.sent, trained.sent + total.idle_s + total.exchange_s)
        if total.weight <= 0:
            raise FedSpeedError(f"round {number}: no client's update is finite; lower train.lr, or set train.clip")
        self._overlapped = {"exchanged_s": total.idle_s + total.exchange_s, "waited_s": waited}
        aggregate = trained.rule.result(trained.start, total.vector, total.weight, self._evened(trained))
        if not all(np.isfinite(t).all() for t in aggregate.state.values()):
            raise FedSpeedError(f"round {number}: the sum of the updates is beyond fp32; lower train.lr, or set train.clip")
        before, target = progress.tensors, aggregate.state
        if config.federation.staleness:
            if trained.start is not before:  # the state has moved since; the update is added to what it is now
                target = {n: (before[n] + (target[n].astype(np.float64) - trained.start[n])).astype(np.float32) for n in before}
            progress.previous, progress.starts = before, ahead.starts if ahead else {}
        progress.server, progress.tensors = server.update(config.federation, progress.server, before, target, still)
        progress.round = number

        last = number == config.federation.rounds
        if last or number % config.federation.evaluate_every == 0:
            self._evaluate(progress.tensors, ledger)
        idle_s, exchange_s = (0.0, waited) if config.federation.staleness else (total.idle_s, total.exchange_s)  # what is hidden is not lost
        ledger = self._share(ledger, idle_s, exchange_s, total.bytes_sent)
        self._note_loss(progress, ledger)
        if last:
            progress.done = "finished"
        elif config.federation.patience and progress.stale >= config.federation.patience:
            progress.done = "early stop"
        self.renewed = ledger.of_ranks("renew").sum() > ledger.of_ranks("ranks").sum() - 0.5
        stop = self.renewed or bool(ledger.of_ranks("stop").any())
        keep = bool(progress.done) or stop or number % config.checkpoint.every == 0
        if keep:
            self._keep_clients(progress)
        if ahead is not None and not (progress.done or stop):
            self._send(ahead)
        now = time.perf_counter()
        seconds, self._settled = now - max(trained.begin, self._settled), now  # under staleness rounds overlap; their seconds do not
        if self.seat.reporter:  # before the commit: a record without a commit is dropped on resuming, the reverse would leave a gap
            norm = math.sqrt(sum(float(np.sum((progress.tensors[n].astype(np.float64) - before[n]) ** 2)) for n in before))
            self._monitor.round(self._record(number, trained.asked, ledger, seconds, aggregate.factor_error, norm))
        if keep:
            self._commit(progress)
        return stop

    def _train(self, progress: Progress, start: Tensors, starts: dict[int, Tensors], number: int, steps: int, asked: tuple[int, ...], rule,
               still: frozenset[str], ledger: Ledger) -> tuple[np.ndarray, float]:
        """The turns of this rank's clients, as many at a time as the engine has seats; returns their summed contribution and weight."""
        mine, begin = [c for c in self.seat.clients if c in asked], time.perf_counter()
        vector, weight = np.zeros(rule.words, dtype=np.float32), 0.0
        self._moved, self._held = {}, still
        passes = self.engine.train_passes(len(mine), steps, self.config.train.accumulation)
        with self.engine.lockstep(passes, backward=True):
            for first in range(0, len(mine), self.engine.seats):
                together = mine[first:first + self.engine.seats]
                for seat, client in enumerate(together):
                    self.begin_turn(client, number, starts.get(client, start), progress.optimizers.get(client), still, seat)
                sums = self.local_steps(together, (number - 1) * self.steps_per_round, steps, number)
                counted = []
                for seat, client in enumerate(together):
                    end = as_arrays(self.engine.state(seat))
                    # A step without a finite gradient is not taken (fp16, ZeRO-1 to 3) or spoils the weights (ZeRO-0 in fp32).
                    counted.append(sums[seat].steps > 0 and all(np.isfinite(t).all() for t in end.values()))
                    if counted[-1]:
                        if self.config.federation.staleness or self._uneven:
                            own, even = starts.get(client, start), self.config.train.local_steps / steps if self._uneven else 1.0
                            self._moved[client] = {n: end[n] - own[n] for n in end}
                            end = {n: (x + even * self._moved[client][n]).astype(np.float32) for n, x in start.items()}
                        vector += rule.contribution(client, self._weights[client], start, end)
                        weight += self._weights[client]
                        if self.config.federation.local_optimizer == "keep":
                            progress.optimizers[client] = as_arrays(self.engine.optimizer_state(seat))
                self._note_turns(ledger, together, sums, counted)
        if mine:
            self._step_s = (time.perf_counter() - begin) / steps
        return vector, weight

    def _note_turns(self, ledger: Ledger, together: list[int], sums: list[Sums], counted: list[bool]) -> None:
        """What turns that were taken together came to. Their time is shared equally: they did one thing."""
        seconds = self._clock.snapshot_and_reset()
        self._seconds = {k: self._seconds.get(k, 0.0) + v for k, v in seconds.items()}
        size = self.engine.groups.client_size
        shared = size * len(together)
        for client, own, counts in zip(together, sums, counted):
            ledger.add_client(client, asked=1.0 / size, train_loss=own.loss, tokens=own.tokens, steps=own.steps / size, received=float(counts) / size,
                              compute_s=seconds["compute"] / shared, gather_s=seconds["gather"] / shared)

    # The two halves of a turn, also used to train a client alone.

    def begin_turn(self, client: int, number: int, tensors: Tensors, optimizer: Tensors | None, still: frozenset[str],
                   seat: int = 0) -> None:
        seed = np.random.SeedSequence([self.config.run.seed, 0x7E4, client, number, self.engine.data_share[1]])
        self.engine.load(as_torch(tensors), as_torch(optimizer) if optimizer else None, still, int(seed.generate_state(1)[0]), seat)

    def local_steps(self, together: list[int], first: int, steps: int, number: int | None = None) -> list[Sums]:
        """`steps` optimizer steps of the clients in the first seats, each on its own rows, counted over the whole run from `first`."""
        train, sums = self.config.train, [Sums()] * len(together)
        total = self.config.federation.rounds * self.steps_per_round
        for i in range(steps):
            work = [client_step(self.seat.clients[client], self.config.run.seed, client, first + i, train.micro_batch, train.accumulation,
                                *self.engine.data_share) for client in together]
            done = self.engine.train_step(work, lr_at(train, first + i, total))
            sums = [a + b for a, b in zip(sums, done)]
            if number is not None:
                self._monitor.step(number, i + 1, steps, sum(done, Sums()).mean_loss)
        return sums

    def _evaluate(self, tensors: Tensors, ledger: Ledger) -> None:
        """Held-out sums of this rank's clients under `tensors`; the ranks of a client share its rows."""
        (shares, share), size = self.engine.data_share, self.config.train.micro_batch
        work = [eval_batches(d.val[share::shares], size, d.pad_id) for d in self.seat.clients.values()]
        self.engine.load(as_torch(tensors))
        with self.engine.lockstep(self.engine.eval_passes(work), backward=False):
            for client, sums in zip(self.seat.clients, self.engine.evaluate(work)):
                ledger.add_client(client, val_loss=sums.loss, val_tokens=sums.tokens, exact=sums.exact, rows=sums.rows)

    # What everyone learns, and what is kept.

    def _share(self, ledger: Ledger, idle_s: float = 0.0, exchange_s: float = 0.0, bytes_sent: int = 0) -> Ledger:
        """The ledger with everyone's words in it. Ends the round's measurement: its own exchange is counted nowhere."""
        seconds = self._clock.snapshot_and_reset()
        stages = {k: self._seconds.get(k, 0.0) + seconds[k] for k in ("compute", "gather", "idle")}
        self._seconds = {}
        ledger.set_rank(self.seat.slot, ranks=1.0, compute_s=stages["compute"], gather_s=stages["gather"], exchange_s=exchange_s,
                        idle_s=stages["idle"] + idle_s, bytes_sent=bytes_sent, peak_bytes=self._peak_bytes(), device_bytes=self.engine.device_bytes,
                        loaded_bytes=self.engine.take_loaded(), step_s=self.engine.take_step_s(), stop=float(self._stop()),
                        renew=float(self._renew()), **dict(zip(("bubble_s", "passes_s"), self.engine.take_bubble())), **self._overlapped)
        size = self.engine.groups.client_size
        for client in self.seat.clients:  # what its ranks did for it and for those who share them
            ledger.add_client(client, exchange_s=exchange_s / size, idle_s=(stages["idle"] + idle_s) / size, bytes_sent=bytes_sent,
                              peak_bytes=self._peak_bytes())
        own = self.engine.sum_over_client(ledger.vector)
        return self._ledger(self._link.sum(own, 0.0).vector)

    def _ledger(self, vector: np.ndarray | None = None) -> Ledger:
        return Ledger(self.config.data.clients, self.seat.ranks, vector, sums_only=self.config.routing.sums_only)

    def _note_loss(self, progress: Progress, ledger: Ledger) -> None:
        """Keep the best round by held-out loss, and count evaluations without a better one."""
        tokens = ledger.of_clients("val_tokens").sum()
        if not tokens:
            return
        loss = float(ledger.of_clients("val_loss").sum() / tokens)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_round, progress.stale = loss, progress.round, 0
            if self.seat.reporter:
                self._journal.save_best(progress.round, progress.tensors)
        else:
            progress.stale += 1

    def _keep_clients(self, progress: Progress) -> None:
        """What clients alone go on with is on disk everywhere before the reporter makes the round count."""
        keeps_optimizers = self.config.federation.local_optimizer == "keep"
        if keeps_optimizers or keeps_starts(self.config):
            own = progress.optimizers if keeps_optimizers else progress.starts
            if self.seat.gateway:
                for client in self.seat.clients:  # a client that was never asked has none, which is not the same as a lost file
                    self._journal.save_client(progress.round, client, own.get(client, {}))
            self._link.sum(np.zeros(1), 0.0)

    def _commit(self, progress: Progress) -> None:
        if self.seat.reporter:
            entry = Entry(progress.round, self._fingerprint, self.config.run.seed, self._config_dict, progress.best_round,
                          progress.best_loss, progress.stale, progress.done)
            packed = pack(progress.tensors, progress.server, progress.previous)
            if self.config.federation.staleness:  # writing is waiting, and the next round's training can go on meanwhile; nothing changes these arrays
                self._writing = self._writer.submit(self._journal.commit, entry, packed)
            else:
                self._journal.commit(entry, packed)

    def _await_commit(self) -> None:
        if self._writing is not None:
            written, self._writing = self._writing, None
            written.result()

    def _record(self, number: int, asked: tuple[int, ...], ledger: Ledger, seconds: float, factor_error: float | None,
                norm: float | None) -> RoundRecord:
        tokens, val_tokens, count = ledger.total("tokens"), ledger.total("val_tokens"), round(ledger.total("received"))
        clients, missing = [], ()
        if not ledger.sums_only:
            clients = [self._client_record(c, ledger) for c in range(self.config.data.clients)]
            missing = tuple(c for c in asked if ledger.of_clients("received")[c] <= 0.5)
        stages = {f"{s}_s": ledger.rank_mean(f"{s}_s") for s in ("compute", "gather", "exchange", "idle")}
        peak, device, step = (ledger.rank_max(word) for word in ("peak_bytes", "device_bytes", "step_s"))
        total = self.config.federation.rounds * self.steps_per_round
        return RoundRecord(
            round=number, train_loss=ledger.total("train_loss") / tokens if tokens else None,
            val_loss=ledger.total("val_loss") / val_tokens if val_tokens else None, tokens=int(tokens),
            tokens_per_s=float(tokens / seconds), seconds=seconds, **stages, bytes_sent=int(ledger.of_ranks("bytes_sent").sum()),
            peak_bytes=None if peak is None else int(peak), device_bytes=int(device) if device else None,
            loaded_bytes=int(ledger.of_ranks("loaded_bytes").sum()), step_s=step or None,
            lr=lr_at(self.config.train, max(0, number * self.steps_per_round - 1), total),
            factor_error=factor_error, update_norm=norm, clients=round(ledger.total("asked")), received=count,
            bubble=_part(ledger, "bubble_s", "passes_s"), overlap=1 - waited if (waited := _part(ledger, "waited_s", "exchanged_s")) is not None else None,
            missing=missing, per_client=tuple(clients))

    def _client_record(self, client: int, ledger: Ledger) -> ClientRecord:
        word = {w: float(ledger.of_clients(w)[client]) for w in CLIENT_WORDS}
        return ClientRecord(
            client=client, train_loss=word["train_loss"] / word["tokens"] if word["tokens"] else None,
            val_loss=word["val_loss"] / word["val_tokens"] if word["val_tokens"] else None, tokens=int(word["tokens"]),
            local_steps=round(word["steps"]), compute_s=word["compute_s"], gather_s=word["gather_s"],
            exchange_s=word["exchange_s"], idle_s=word["idle_s"], bytes_sent=int(word["bytes_sent"]), peak_bytes=int(word["peak_bytes"]))


def _part(ledger: Ledger, of: str, whole: str) -> float | None:
    """Over all ranks; None where there is no whole."""
    total = float(ledger.of_ranks(whole).sum())
    return min(1.0, max(0.0, float(ledger.of_ranks(of).sum()) / total)) if total > 0 else None


def keeps_starts(config: RunConfig) -> bool:
    """Whether what clients go on from under staleness is kept with the journal, so that a resumed run is the same one. It tells a client's own update, and so
    stays in memory where that is a secret: then the first round after a resume is trained from what was common."""
    return bool(config.federation.staleness) and not config.routing.sums_only


def start(config: RunConfig, engine: ClientEngine) -> Progress:
    """The state before round 1: what the engine was built with, the same on every rank."""
    tensors = as_arrays(engine.state())
    return Progress(0, tensors, server.init(config.federation, tensors))


def pack(tensors: Tensors, moments: server.State, previous: Tensors | None = None) -> Tensors:
    """Global tensors, server moments, and under staleness the state before, under one set of names, for the journal."""
    return ({f"global/{n}": t for n, t in tensors.items()} | {f"server/{m}/{n}": t for m, ts in moments.items() for n, t in ts.items()}
            | {f"previous/{n}": t for n, t in (previous or {}).items()})


def unpack(packed: Tensors) -> tuple[Tensors, server.State, Tensors | None]:
    tensors: Tensors = {}
    previous: Tensors = {}
    moments: server.State = {}
    for name, tensor in packed.items():
        kind, rest = name.split("/", 1)
        if kind == "global":
            tensors[rest] = tensor
        elif kind == "previous":
            previous[rest] = tensor
        else:
            moment, rest = rest.split("/", 1)
            moments.setdefault(moment, {})[rest] = tensor
    return tensors, moments, previous or None


def as_arrays(tensors: dict[str, torch.Tensor]) -> Tensors:
    return {n: t.detach().numpy() for n, t in tensors.items()}


def as_torch(arrays: Tensors) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(a) for n, a in arrays.items()}

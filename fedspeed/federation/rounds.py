"""The federated round: ask clients, let each take its local steps from the global state, sum, apply, evaluate, keep."""

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedspeed import activity
from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.run import RunConfig
from fedspeed.data.batches import client_step, eval_batches
from fedspeed.data.clients import ClientData
from fedspeed.data.config import local_steps_of
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.errors import FedSpeedError
from fedspeed.federation import rules, server
from fedspeed.federation.layout import Layout
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.link import ClientLink, Started
from fedspeed.federation.schedule import lr_at, sample
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.records import RoundRecord
from fedspeed.monitor.round_record import round_record

Tensors = dict[str, np.ndarray]
FIRST_STEPS = 2  # of a run with a budget of seconds, before it knows how long a step takes
MOST_MOVED = 1e12  # that a client's change counts for, squared: sums of the masked modes have a range
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
    best_round: int = 0  # 0 is the start, if best_loss is finite: else there is none
    best_loss: float = math.inf
    stale: int = 0
    done: str = ""
    previous: Tensors | None = None  # under staleness: the state that the round under way is trained from
    starts: dict[int, Tensors] = field(default_factory=dict)  # and of this rank's clients, what each goes on from itself
    likeness: float | None = None  # and how far clients' changes were alike in the last round (see `Federation._foreseen`)

    @property
    def has_best(self) -> bool:
        """Whether any round, or the start, has been evaluated."""
        return math.isfinite(self.best_loss)


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
    weighed_steps: float  # of this rank's clients, weight times steps taken
    moved: dict[int, Tensors]  # under staleness: what each of its clients has changed
    starts: dict[int, Tensors]
    stages: dict[str, float]  # seconds of its training by stage, `other` being one
    figures: dict[str, float]  # of the engine in it
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
        self._pass_s: float | None = None  # seconds of a local step of as many clients as train at a time, in the last round
        self._late_s = 0.0  # waited for others in the last sum of counters
        self._between: dict[str, float] = {}  # seconds since the last one by stage, but for training: they count for the round that is settled next
        self._overlapped: dict[str, float] = {}  # seconds of this round's exchange, and of waiting for it
        self._seconds: dict[str, float] = {}  # of the round in training so far, by stage
        self._measured = False  # whether the loss before round 1 is known
        self._writer: ThreadPoolExecutor | None = None  # while rounds run
        self._writing: Future | None = None  # under staleness: the commit of the last round

    def run(self, progress: Progress) -> Progress:
        """Run all rounds that are left; returns what the last one left. `done` says why the run is over, empty if it was asked to stop."""
        with ThreadPoolExecutor(1, "journal") as self._writer:
            done = self._run(progress)
            self._await_commit()
            return done

    def _run(self, progress: Progress) -> Progress:
        self.baseline(progress)
        if progress.round:  # what came before belongs to no round of this start
            self._clock.snapshot_and_reset()
            self._between, self._late_s = {}, 0.0
        self._layout = Layout.of(progress.tensors)
        stale, pending, rounds = self.config.federation.staleness, None, self.config.federation.rounds
        number = progress.round
        while not progress.done:
            if number < rounds:
                number += 1
                # The first one after a resume is trained from what it was trained from before.
                resumed = pending is None and stale and progress.previous is not None
                starts = progress.starts if resumed else self._foreseen(progress, pending) if pending is not None else {}
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

    def baseline(self, progress: Progress) -> None:
        """Round 0, if it is to come yet: the held-out loss before any training, which the rounds have to beat, and the journal entry that makes a crash in
        round 1 resumable."""
        if progress.round or progress.done or self._measured:
            return
        self._measured = True
        ledger = self._ledger()
        self._clock.snapshot_and_reset()
        self._evaluate(progress.tensors, ledger, "the evaluation before round 1")
        ledger = self._share(ledger)
        if not math.isfinite(ledger.of_clients("val_loss").sum()):
            raise FedSpeedError("the held-out loss is not finite before any training; check the weights in model.base and adapter.start_from, "
                                "or choose another model.dtype")
        if self.seat.reporter:
            self._monitor.round(self._record(0, (), ledger, factor_error_exact=False, clipped=0))
        if not progress.has_best:  # a run that was ended in round 1 has noted it before
            self._note_loss(progress, ledger)
        self._keep_clients(progress)
        self._commit(progress)

    def _foreseen(self, progress: Progress, pending: Trained) -> dict[int, Tensors]:
        """Under staleness, what each client goes on from while its update is still under way: the state as it will be, as far as it can tell.

        A client that went on from the common state would take its next steps as if it had not taken the last ones, and such a delay makes a step size unstable
        at half of what it bears in time. So it expects the mean change to be a part of its own: all of it where data are alike (which undoes the delay, as in
        DaSGD, Zhou et al., 2020, and Overlap Local-SGD, Wang et al., 2020), its own share where all go different ways (where more would let clients drift
        apart). The part is that of least squares in the last round, |mean change|^2 / mean |change|^2, which everybody knows from sums. When the aggregate
        comes it takes the place of what was foreseen: only changes are summed. For server optimizers too.
        """
        part = 1.0 / len(pending.asked) if progress.likeness is None else progress.likeness

        def ahead(change: Tensors) -> Tensors:
            target = {n: (x + part * change[n]).astype(np.float32) for n, x in progress.tensors.items()}
            return server.update(self.config.federation, progress.server, progress.tensors, target, pending.still)[1]

        return {client: ahead(change) for client, change in pending.moved.items()}

    def _train_round(self, progress: Progress, number: int, start: Tensors, starts: dict[int, Tensors]) -> Trained:
        """A round's local steps, from the state `start`; clients that are in `starts` begin there."""
        config = self.config
        self._clock.trace.round(number)
        ledger = self._ledger()
        rule = rules.make_rule(config.federation.aggregation, self._layout, config.data.clients, config.run.seed, number)
        still = rules.held(config.federation.aggregation, number, self._layout.names)
        asked = sample(config.run.seed, number, config.data.clients, config.federation.clients_per_round)
        self._between = _added(self._between, self._clock.snapshot_and_reset())
        self._seconds = {}
        trained = Trained(number, start, rule, still, ledger, asked, np.zeros(rule.words, dtype=np.float32), 0.0, 0.0, {}, starts, {}, {})
        self._train(progress, trained, self._steps(asked))
        trained.stages = _added(self._seconds, self._clock.snapshot_and_reset())
        trained.figures = dict(zip(("bubble_s", "passes_s"), self.engine.take_bubble())) | {"step_s": self.engine.take_step_s()}
        return trained

    def _send(self, trained: Trained) -> None:
        trained.sent = time.perf_counter()
        trained.started = self._link.start(trained.vector, trained.weight, trained.rule.parts)

    def _steps(self, asked: tuple[int, ...]) -> int:
        """How many local steps this rank's clients take in a round."""
        federation, mine = self.config.federation, sum(client in asked for client in self.seat.clients)
        if federation.round_budget == "steps":
            return self.steps_per_round
        if not mine:
            fitting = self.steps_per_round  # others decide
        elif self._pass_s is None:
            fitting = FIRST_STEPS
        else:
            fitting = int(federation.round_seconds / (self._pass_s * -(-mine // self.engine.client_slots)))
        return self.engine.agree_least(max(1, min(self.steps_per_round, fitting)))

    def _evened(self, trained: Trained) -> float:
        """What the mean change is multiplied by: the mean number of local steps, of the number that all changes have been brought to.

        A client that takes more steps moves further, and would count for more than its rows do. So changes are summed for each step, and multiplied by the
        mean number of steps (FedNova; Wang et al., NeurIPS 2020).
        """
        if not self._uneven:
            return 1.0
        weight, steps = self._link.sum(np.array([trained.weight, trained.weighed_steps]), 0.0).vector
        return float(steps / weight / self.config.train.local_steps)

    def _settle_round(self, progress: Progress, trained: Trained, ahead: Trained | None = None) -> bool:
        """The rest of a round: its sum, what it does to the state, its evaluation and records. True if the run is to stop here.

        Args:
            ahead: the round after it, whose local steps have been taken already. Its update is sent before this round is written down.
        """
        config, number, ledger, still = self.config, trained.number, trained.ledger, trained.still
        waited = time.perf_counter()
        with activity.during(f"the exchange of round {number}"):
            total = self._link.finish(trained.started)
        waited = time.perf_counter() - waited
        self._await_commit()  # of the round before: it clears away what no round needs
        self._clock.trace.span("exchange", f"exchange of round {number}", trained.sent, trained.sent + total.idle_s + total.exchange_s)
        if total.weight <= 0:
            raise FedSpeedError(f"round {number}: no client's update is finite; lower train.lr, or set train.clip")
        self._overlapped = {"exchanged_s": total.idle_s + total.exchange_s, "waited_s": waited}
        evened = self._evened(trained)
        aggregate = trained.rule.result(trained.start, total.vector, total.weight, evened)
        if not all(np.isfinite(t).all() for t in aggregate.state.values()):
            raise FedSpeedError(f"round {number}: the sum of the updates is beyond fp32; lower train.lr, or set train.clip")
        before, target = progress.tensors, aggregate.state
        if config.federation.staleness:
            if trained.start is not before:  # the state has moved since; the update is added to what it is now
                target = {n: (before[n] + (target[n].astype(np.float64) - trained.start[n])).astype(np.float32) for n in before}
            # Without a round ahead: what one would have begun with, for a run that is made longer.
            progress.previous, progress.starts = before, ahead.starts if ahead else self._foreseen(progress, trained)
        progress.server, progress.tensors = server.update(config.federation, progress.server, before, target, still)
        progress.round = number

        last = number == config.federation.rounds
        if last or number % config.federation.evaluate_every == 0:
            self._evaluate(progress.tensors, ledger, f"the evaluation after round {number}")
        # Only what this rank waited for the exchange is lost time. Whom a round had to wait for under staleness shows in the sum of counters.
        idle_s = 0.0 if config.federation.staleness else min(total.idle_s, waited)
        ledger = self._share(ledger, trained, idle_s, waited - idle_s, total.bytes_sent)
        self._note_loss(progress, ledger)
        if config.federation.staleness:
            progress.likeness = _likeness(aggregate.state, trained.start, evened, ledger.total("moved") / total.weight)
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
        if self.seat.reporter:  # before the commit: a record without a commit is dropped on resuming, the reverse would leave a gap
            norm = trained.rule.change_norm(before, progress.tensors)
            self._monitor.round(self._record(number, trained.asked, ledger, update_norm=norm, factor_error=aggregate.factor_error,
                                             factor_error_exact=trained.rule.exact_error, clipped=total.clipped))
        if keep:
            self._commit(progress)
        return stop

    def _train(self, progress: Progress, trained: Trained, steps: int) -> None:
        """The turns of this rank's clients, as many at a time as the engine has seats; adds what they contribute to `trained`."""
        mine, begin, start, starts = [c for c in self.seat.clients if c in trained.asked], time.perf_counter(), trained.start, trained.starts
        passes = self.engine.train_passes(len(mine), steps, self.config.train.accumulation)
        with self.engine.lockstep(passes, backward=True):
            for first in range(0, len(mine), self.engine.client_slots):
                together = mine[first:first + self.engine.client_slots]
                for seat, client in enumerate(together):
                    self.begin_turn(client, trained.number, starts.get(client, start), progress.optimizers.get(client), trained.still, seat)
                sums = self.local_steps(together, (trained.number - 1) * self.steps_per_round, steps, trained.number)
                counted = []
                for seat, client in enumerate(together):
                    end, taken, weight = as_arrays(self.engine.state(seat)), sums[seat].steps, self._weights[client]
                    # A step without a finite gradient is not taken (fp16, ZeRO-1 to 3) or spoils the weights (ZeRO-0 in fp32).
                    counted.append(taken > 0 and all(np.isfinite(t).all() for t in end.values()))
                    if counted[-1]:
                        if self.config.federation.staleness or self._uneven:
                            own, even = starts.get(client, start), self.config.train.local_steps / taken if self._uneven else 1.0
                            moved = trained.moved[client] = {n: even * (end[n] - own[n]) for n in end}
                            end = {n: (x + moved[n]).astype(np.float32) for n, x in start.items()}
                            square = sum(float(np.sum(t.astype(np.float64) ** 2)) for t in moved.values())
                            trained.ledger.add_client(client, moved=weight * min(square, MOST_MOVED) / self.engine.groups.client_size)
                        trained.vector += trained.rule.contribution(client, weight, start, end)
                        trained.weight += weight
                        trained.weighed_steps += weight * taken
                        if self.config.federation.local_optimizer == "keep":
                            progress.optimizers[client] = as_arrays(self.engine.optimizer_state(seat))
                self._note_turns(trained.ledger, together, sums, counted)
        if mine:
            self._pass_s = (time.perf_counter() - begin) / steps / -(-len(mine) // self.engine.client_slots)

    def _note_turns(self, ledger: Ledger, together: list[int], sums: list[Sums], counted: list[bool]) -> None:
        """What turns that were taken together came to. Their time is shared equally: they did one thing."""
        seconds = self._clock.snapshot_and_reset()
        self._seconds = _added(self._seconds, seconds)
        size = self.engine.groups.client_size
        shared = size * len(together)
        for client, own, counts in zip(together, sums, counted):
            ledger.add_client(client, asked=1.0 / size, train_loss=own.loss, tokens=own.tokens, steps=own.steps / size, received=float(counts) / size,
                              compute_s=seconds["compute"] / shared, gather_s=seconds["gather"] / shared)

    # The two halves of a turn, also used to train a client alone.

    def begin_turn(self, client: int, number: int, tensors: Tensors, optimizer: Tensors | None, still: frozenset[str],
                   seat: int = 0) -> None:
        seed = np.random.SeedSequence([self.config.run.seed, 0x7E4, client, number, self.engine.data_share[1]])
        self.engine.load(as_torch(tensors), as_torch(optimizer) if optimizer else None, frozen=still,
                         seed=int(seed.generate_state(1)[0]), slot=seat)

    def local_steps(self, together: list[int], first: int, steps: int, number: int | None = None) -> list[Sums]:
        """`steps` optimizer steps of the clients in the first seats, each on its own rows, counted over the whole run from `first`."""
        told = activity.during(f"round {number}", steps, "local step", quiet=True) if number else contextlib.nullcontext()
        with told:
            return self._steps_of(together, first, steps, number)

    def _steps_of(self, together: list[int], first: int, steps: int, number: int | None) -> list[Sums]:
        train, sums = self.config.train, [Sums()] * len(together)
        total = self.config.federation.rounds * self.steps_per_round
        for i in range(steps):
            work = [client_step(self.seat.clients[client], self.config.run.seed, client, first + i, train.micro_batch, train.accumulation,
                                *self.engine.data_share) for client in together]
            done = self.engine.train_step(work, lr_at(train, first + i, total))
            sums = [a + b for a, b in zip(sums, done)]
            activity.advance()
            if number is not None:
                self._monitor.step(number, i + 1, steps, sum(done, Sums()).mean_loss)
        return sums

    def _evaluate(self, tensors: Tensors, ledger: Ledger, name: str) -> None:
        """Held-out sums of this rank's clients under `tensors`; the ranks of a client share its rows. `name`: of this evaluation."""
        (shares, share), size = self.engine.data_share, self.config.train.micro_batch
        work = [eval_batches(d.val[share::shares], size, d.pad_id, d.limit) for d in self.seat.clients.values()]
        with activity.during(name, sum(map(len, work)), "batch"):
            self.engine.load(as_torch(tensors))
            with self.engine.lockstep(self.engine.eval_passes(work), backward=False):
                evaluated = self.engine.evaluate(work)
            for client, sums in zip(self.seat.clients, evaluated):
                ledger.add_client(client, val_loss=sums.loss, val_tokens=sums.tokens, exact=sums.exact, rows=sums.rows)

    # What everyone learns, and what is kept.

    def _share(self, ledger: Ledger, trained: Trained | None = None, idle_s: float = 0.0, exchange_s: float = 0.0, bytes_sent: int = 0) -> Ledger:
        """The ledger with everyone's words in it. Ends the round's measurement: what this sum itself takes counts for the next round.

        A round's seconds on this rank are those of its training, of its settlement, and of what came between the last round's measurement and this one's and
        was no training: so every moment of a run belongs to one round, and to one stage of it at most.

        Args:
            trained: the round that is settled; None: there was no training.
            idle_s, exchange_s: waited for the others' updates to come, and to travel.
        """
        stages = _added(_added(trained.stages if trained else {}, self._between), self._clock.snapshot_and_reset())
        wall_s, idle_s = sum(stages.values()), stages["idle"] + self._late_s + idle_s
        self._between, self._late_s = {}, 0.0
        ledger.set_rank(self.seat.slot, **registry.measured(), ranks=1.0, compute_s=stages["compute"], gather_s=stages["gather"], exchange_s=exchange_s,
                        idle_s=idle_s, wall_s=wall_s, bytes_sent=bytes_sent, peak_bytes=self._peak_bytes(), device_bytes=self.engine.device_bytes,
                        loaded_bytes=self.engine.take_loaded(), stop=float(self._stop()), renew=float(self._renew()),
                        **(trained.figures if trained else {}), **self._overlapped)
        size = self.engine.groups.client_size
        for client in self.seat.clients:  # what its ranks did for it and for those who share them
            ledger.add_client(client, exchange_s=exchange_s / size, idle_s=idle_s / size, bytes_sent=bytes_sent,
                              peak_bytes=self._peak_bytes())
        own, begin = self.engine.sum_over_client(ledger.vector), time.perf_counter()
        told = self._link.sum(own, 0.0)
        self._late_s = min(told.idle_s, time.perf_counter() - begin)
        if trained:
            self._clock.trace.span("wait", f"others of round {trained.number}", begin, begin + told.idle_s)
        return self._ledger(told.vector)

    def _ledger(self, vector: np.ndarray | None = None) -> Ledger:
        return Ledger(self.config.data.clients, self.seat.ranks, vector, sums_only=self.config.routing.sums_only)

    def _note_loss(self, progress: Progress, ledger: Ledger) -> None:
        """Keep the best state by held-out loss, the start being one, and count evaluations without a better one."""
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
                          progress.best_loss, progress.stale, progress.done, likeness=progress.likeness)
            packed = pack(progress.tensors, progress.server, progress.previous)
            if self.config.federation.staleness and self._writer:
                # Writing is waiting, and the next round's training can go on meanwhile; nothing changes these arrays.
                self._writing = self._writer.submit(self._journal.commit, entry, packed)
            else:
                self._journal.commit(entry, packed)

    def _await_commit(self) -> None:
        if self._writing is not None:
            written, self._writing = self._writing, None
            written.result()

    def _record(self, number: int, asked: tuple[int, ...], ledger: Ledger, **same) -> RoundRecord:
        lr = lr_at(self.config.train, max(0, number * self.steps_per_round - 1), self.config.federation.rounds * self.steps_per_round)
        return round_record(ledger, number, asked, lr=lr, **same)


def _likeness(end: Tensors, start: Tensors, evened: float, mean_square: float) -> float:
    """|mean change|^2 / mean |change|^2, of changes before they were `evened`: 1 where all clients made the same one."""
    square = sum(float(np.sum((end[n].astype(np.float64) - start[n]) ** 2)) for n in end)
    return min(1.0, square / (evened * mean_square)) if mean_square > 0 else 1.0


def _added(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Seconds by stage, of two stretches of time together."""
    return {stage: a.get(stage, 0.0) + b.get(stage, 0.0) for stage in a.keys() | b.keys()}


def keeps_starts(config: RunConfig) -> bool:
    """Whether what clients go on from under staleness is kept with the journal, so that a resumed run is the same one. It tells a client's own update, and so
    stays in memory where that is a secret: then the first round after a resume is trained from what was common."""
    return bool(config.federation.staleness) and not config.routing.sums_only


def start(config: RunConfig, engine: ClientEngine) -> Progress:
    """The state before round 1: what the engine was built with, the same on every rank."""
    tensors = as_arrays(engine.state())
    if name := rules.stuck(config.federation.aggregation, tensors):
        raise FedSpeedError(f"federation.aggregation=freeze_a keeps every A as it is, but {name} is zero in "
                            f"adapter.start_from={config.adapter.start_from}, so that its B would never move; "
                            "choose another aggregation, or start from an adapter that was trained")
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

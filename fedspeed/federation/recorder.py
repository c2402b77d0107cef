"""Measurements of rounds: counters and seconds that every rank measures, their sum over ranks, and the record
that the monitor shows.

Every moment of a run belongs to one round, and to at most one stage of it. A round's seconds on a rank are
those of its local steps, of its settlement, and of everything else since the measurement of the round before
ended, except the next round's local steps.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspeed import activity
from fedspeed.config.run import RunConfig
from fedspeed.data.config import local_steps_of
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.federation.header import Signals
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.link import ClientLink, Sum
from fedspeed.federation.methods.turns import Trained, Turn
from fedspeed.federation.role import RankRole
from fedspeed.federation.round_monitor import RoundMonitor
from fedspeed.federation.schedule import lr_in_run
from fedspeed.monitor.clock import StageClock
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import NOTHING
from fedspeed.monitor.round_record import round_record

Seconds = dict[str, float]  # by stage


def added(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Return the sums of two tables of numbers, name by name."""
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in a.keys() | b.keys()}


def held_out_loss(ledger: Ledger) -> float | None:
    """Return the mean held-out loss over all clients' answer tokens; None where nothing was evaluated, or the
    ledger has no slot for losses.
    """
    if not (ledger.has_client_slot("val_loss") and ledger.has_client_slot("val_tokens")):
        return None
    tokens = ledger.total("val_tokens")
    return ledger.total("val_loss") / tokens if tokens else None


@dataclass
class Training:
    """Measurements of a round's local steps on one rank.

    Attributes:
        stages: seconds by stage, with `other` for the rest. figures: of the engine and of transforms of
            updates, by slot of the ledger.
    """

    stages: Seconds = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class ExchangeCost:
    """Costs of a round's exchanges on one rank.

    Attributes:
        exchanged_s: seconds from the sending of updates until all had arrived. waited_s: seconds in which
            this rank waited for that.
        idle_s, travel_s: what `waited_s` consists of: waiting for other participants to send, and the
            transfer.
    """

    exchanged_s: float = 0.0
    waited_s: float = 0.0
    idle_s: float = 0.0
    travel_s: float = 0.0
    bytes_sent: int = 0


@dataclass(frozen=True)
class StopSignals:
    """Requests from outside that a run checks at the end of every round.

    Attributes:
        stop: returns whether the scheduler wants this process to end.
        renew: returns whether this process has a newer roster of participants. When all have, the run stops,
            to be restarted with it.
    """

    stop: Callable[[], bool]
    renew: Callable[[], bool] = lambda: False


class Recorder:
    """Measures one rank's rounds, sums measurements over ranks, and reports them.

    Args:
        monitor: receives the records, on the reporter. clock: of this rank's stages.
        peak_bytes: returns the peak memory of this rank.
        hides: what the run's transforms of updates hide (monitor.metrics.metric.REVEALABLE).
        spent: returns what this rank's transforms of updates have spent so far, by slot of the ledger.
        told: returns the bytes that this rank has sent so far in messages between clients and server.
    """

    def __init__(
        self,
        config: RunConfig,
        role: RankRole,
        engine: ClientEngine,
        link: ClientLink,
        *,
        monitor: RoundMonitor,
        clock: StageClock,
        peak_bytes: Callable[[], int],
        signals: StopSignals,
        hides: frozenset[str] = NOTHING,
        spent: Callable[[], Mapping[str, float]] = dict,
        told: Callable[[], int] = int,
    ):
        self._config = config
        self._role = role
        self._engine = engine
        self._link = link
        self._monitor = monitor
        self._clock = clock
        self._peak_bytes = peak_bytes
        self._signals = signals
        self._hides = hides
        self._spent = spent
        self._spent_before: Mapping[str, float] = spent()  # in earlier rounds
        self._late_s = 0.0  # waiting for other ranks in the last sum of ledgers
        self._between: Seconds = {}  # since then, without local steps: part of the round that is settled next
        self._training: Seconds = {}  # local steps of the current round so far
        self._cost = ExchangeCost()  # of the round that is settled next
        self._told = told
        self._told_before = told()  # in earlier rounds

    def ledger(self) -> Ledger:
        """Return an empty ledger for this rank's values."""
        return self._ledger(None)

    def start_measuring(self) -> None:
        """Start measuring now; the time before belongs to no round."""
        self._clock.snapshot_and_reset()
        self._between = {}
        self._late_s = 0.0
        self._cost = ExchangeCost()
        self._told_before = self._told()

    def begin_training(self, round: int) -> None:
        """Count the time from now on as local steps of a round."""
        self._clock.trace.round(round)
        self._between = added(self._between, self._clock.snapshot_and_reset())
        self._training = {}

    def note_turns(self, ledger: Ledger, simultaneous: Sequence[tuple[Turn, Trained]]) -> None:
        """Note the sums of turns that were trained at the same time, and divide their time equally."""
        seconds = self._clock.snapshot_and_reset()
        self._training = added(self._training, seconds)
        size = self._engine.groups.client_size
        shared = size * len(simultaneous)
        for turn, trained in simultaneous:
            sums = trained.sums
            ledger.add_client(
                turn.client,
                train_loss=sums.loss,
                tokens=sums.tokens,
                steps=sums.steps / size,
                compute_s=seconds["compute"] / shared,
                gather_s=seconds["gather"] / shared,
            )

    def note_updates(self, ledger: Ledger, counted: Mapping[int, bool]) -> None:
        """Note which clients trained in a round, and whether each client's update was usable."""
        size = self._engine.groups.client_size
        for client, is_counted in counted.items():
            ledger.add_client(client, asked=1.0 / size, received=float(is_counted) / size)

    def end_training(self, training: Training) -> None:
        """Add the measurements since `begin_training` to `training`: seconds, the engine's figures, and what
        transforms of updates have spent.
        """
        training.stages = added(training.stages, added(self._training, self._clock.snapshot_and_reset()))
        bubble_s, passes_s = self._engine.take_bubble()
        pipeline = {"bubble_s": bubble_s, "passes_s": passes_s}
        spent = self._spent()
        newly_spent = {name: amount - self._spent_before[name] for name, amount in spent.items()}
        self._spent_before = spent
        figures = added(training.figures, pipeline | newly_spent)
        training.figures = figures | {"step_s": self._engine.take_step_s()}

    def note_exchange(self, name: str, total: Sum, *, sent_at: float, waited_s: float) -> None:
        """Note the costs of an exchange.

        Args:
            name: of the exchange, in the trace. sent_at: its start (time.perf_counter).
            waited_s: how long this rank waited for it.
        """
        duration_s = total.idle_s + total.exchange_s
        self._clock.trace.span("exchange", name, sent_at, sent_at + duration_s)
        # Only the time that this rank waited is lost. Under staleness, the wait for slower participants is
        # measured in the sum of ledgers instead.
        idle_s = 0.0 if self._config.federation.staleness else min(total.idle_s, waited_s)
        cost = self._cost
        cost.exchanged_s += duration_s
        cost.waited_s += waited_s
        cost.idle_s += idle_s
        cost.travel_s += waited_s - idle_s
        cost.bytes_sent += total.bytes_sent

    def finish_round(self, ledger: Ledger, training: Training | None = None) -> None:
        """Write this rank's measurements of a round into its ledger, and end them: what follows belongs to
        the next round.

        Args:
            training: of the round; None: there was none.
        """
        before = training.stages if training else {}
        stages = added(added(before, self._between), self._clock.snapshot_and_reset())
        self._fill(ledger, stages, training)
        self._between = {}
        self._late_s = 0.0
        self._cost = ExchangeCost()
        self._told_before = self._told()

    def sum_over_ranks(self, ledger: Ledger, *, round: int, training: Training | None = None) -> Ledger:
        """Finish a round, and return the sum of all ranks' ledgers. The time of the sum itself belongs to the
        next round. Collective over all ranks.

        Args:
            ledger: with this rank's values. training: of the round; None: there was none.

        Raises:
            LostPeerError: a participant is missing.
        """
        self.finish_round(ledger, training)
        of_client = self._engine.sum_over_client(ledger.vector)
        began = time.perf_counter()
        total = self._link.sum(of_client, 0.0)
        self._late_s = min(total.idle_s, time.perf_counter() - began)
        if training:
            self._clock.trace.span("wait", f"others of round {round}", began, began + total.idle_s)
        return self._ledger(total.vector)

    def sum_header(self, vector: np.ndarray, label: str) -> Sum:
        """Return the sum of all ranks' vectors of a header, and note its costs: they belong to the round
        whose update comes next. Collective over all ranks.

        Args:
            vector: [n] float64. Of each client, the gateway's counts. label: of the exchange.

        Raises:
            LostPeerError: a participant is missing.
        """
        began = time.perf_counter()
        with activity.during(f"the {label}"):
            total = self._link.sum(vector, 0.0, label=label)
        waited_s = time.perf_counter() - began
        idle_s = min(total.idle_s, waited_s)
        self._late_s += idle_s
        self._cost.travel_s += waited_s - idle_s
        self._cost.bytes_sent += total.bytes_sent
        self._clock.trace.span("wait", f"others for the {label}", began, began + idle_s)
        return total

    def signals(self) -> Signals:
        """Return what this rank wants of the run: to stop, or to begin again with a newer roster."""
        return Signals(1.0, float(self._signals.stop()), float(self._signals.renew()))

    def ledger_of(self, vector: np.ndarray) -> Ledger:
        """Return the ledger of a sum's values."""
        return self._ledger(vector)

    def report(self, round: int, clients: Sequence[int], ledger: Ledger, **values: Any) -> None:
        """Give the monitor the record of a round.

        Args:
            clients: sampled for the round. ledger: summed over all ranks.
            values: of the record that are in no ledger, by name (factor_error, update_norm, ...).
        """
        steps = local_steps_of(self._config.train, self._role.cluster)
        lr = lr_in_run(self._config, max(0, round * steps - 1), steps)
        self._monitor.round(round_record(ledger, round, tuple(clients), lr=lr, **values))

    def _fill(self, ledger: Ledger, stages: Seconds, training: Training | None) -> None:
        """Write this rank's measurements of a round into its slots of a ledger."""
        cost = self._cost
        bytes_sent = cost.bytes_sent + self._told() - self._told_before
        engine = self._engine
        size = self._engine.groups.client_size
        idle_s = stages["idle"] + self._late_s + cost.idle_s
        ledger.set_rank(
            self._role.worker_index,
            **registry.measured(),
            ranks=1.0,
            compute_s=stages["compute"],
            gather_s=stages["gather"],
            exchange_s=cost.travel_s,
            idle_s=idle_s,
            wall_s=sum(stages.values()),
            bytes_sent=bytes_sent,
            peak_bytes=self._peak_bytes(),
            device_bytes=engine.device_bytes,
            loaded_bytes=engine.take_loaded(),
            stop=float(self._signals.stop()),
            renew=float(self._signals.renew()),
            exchanged_s=cost.exchanged_s,
            waited_s=cost.waited_s,
            **(training.figures if training else {}),
        )
        for client in self._role.clients:  # clients that share a rank share these figures
            ledger.add_client(
                client,
                exchange_s=cost.travel_s / size,
                idle_s=idle_s / size,
                bytes_sent=bytes_sent,
                peak_bytes=self._peak_bytes(),
                device_bytes=engine.device_bytes,
            )

    def _ledger(self, vector: np.ndarray | None) -> Ledger:
        clients = self._config.data.clients
        sums_only = self._config.routing.sums_only
        return Ledger(
            clients,
            self._role.ranks,
            vector,
            sums_only=sums_only,
            hides=self._hides,
            tasks=self._config.evaluation.tasks,
        )

"""What rounds come to: counters and seconds that every rank measures, the sum that makes them known to all,
and the record that is shown.

Every moment of a run belongs to one round, and to one stage of it at most. A round's seconds on a rank are
those of its training, of its settlement, and of what came between the last round's measurement and this one's
and was no training.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedspeed.config.run import RunConfig
from fedspeed.data.config import local_steps_of
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.federation.ledger import Ledger
from fedspeed.federation.link import ClientLink, Sum
from fedspeed.federation.methods.base import Trained, Turn
from fedspeed.federation.role import RankRole
from fedspeed.federation.schedule import lr_at
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import NOTHING
from fedspeed.monitor.round_record import round_record

Seconds = dict[str, float]  # by stage


def added(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Return the sums of two tables of numbers, name by name."""
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in a.keys() | b.keys()}


def held_out_loss(ledger: Ledger) -> float | None:
    """Return the mean held-out loss over all clients' answer tokens, None where nothing was evaluated, or
    nobody may be told.
    """
    if not (ledger.tells("val_loss") and ledger.tells("val_tokens")):
        return None
    tokens = ledger.total("val_tokens")
    return ledger.total("val_loss") / tokens if tokens else None


@dataclass
class Training:
    """What a round's training measured: seconds by stage, `other` being one, and figures of the engine in
    it.
    """

    stages: Seconds = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Exchanged:
    """What a round's exchanges have cost this rank.

    Attributes:
        exchanged_s: seconds from the sending of updates until all had come. waited_s: of these, waited here.
        idle_s, travel_s: parts of what was waited: for the others' updates to come, and to travel.
    """

    exchanged_s: float = 0.0
    waited_s: float = 0.0
    idle_s: float = 0.0
    travel_s: float = 0.0
    bytes_sent: int = 0


@dataclass(frozen=True)
class Signals:
    """What the outside may ask a run, at the end of every round.

    Attributes:
        stop: whether the scheduler wants this process to end.
        renew: whether this process has a newer list of participants. When all have, the run stops, to be
            started again with it.
    """

    stop: Callable[[], bool]
    renew: Callable[[], bool] = lambda: False


class Recorder:
    """Measures one rank's rounds, and tells what all ranks measured.

    Args:
        monitor: takes the records, on the rank that reports. clock: of this rank's stages.
        peak_bytes: the most memory that this rank has held.
        hides: what the run's transforms of updates hide (monitor.metrics.metric.BESIDE).
        spent: what this rank's transforms of updates have spent so far, by slot.
    """

    def __init__(
        self,
        config: RunConfig,
        role: RankRole,
        engine: ClientEngine,
        link: ClientLink | None,
        *,
        monitor: Any,
        clock: Any,
        peak_bytes: Callable[[], int],
        signals: Signals,
        hides: frozenset[str] = NOTHING,
        spent: Callable[[], Mapping[str, float]] = dict,
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
        self._spent_before: Mapping[str, float] = spent()  # by the training of earlier rounds
        self._late_s = 0.0  # waited for others in the last sum of counters
        self._between: Seconds = {}  # since then, but for training: it counts for the round settled next
        self._training: Seconds = {}  # of the round in training, so far
        self._exchanged = Exchanged()  # of the round that is settled next

    def ledger(self) -> Ledger:
        """Return an empty ledger, for this rank to fill in."""
        return self._ledger(None)

    def forget(self) -> None:
        """Begin to measure now: what came before belongs to no round."""
        self._clock.snapshot_and_reset()
        self._between = {}
        self._late_s = 0.0

    def begin_training(self, round: int) -> None:
        """Measure from now on for the training of a round."""
        self._clock.trace.round(round)
        self._between = added(self._between, self._clock.snapshot_and_reset())
        self._training = {}

    def note_turns(self, ledger: Ledger, together: Sequence[tuple[Turn, Trained]]) -> None:
        """Note what turns that were taken together came to. Their time is shared equally: they did one
        thing.
        """
        seconds = self._clock.snapshot_and_reset()
        self._training = added(self._training, seconds)
        size = self._engine.groups.client_size
        shared = size * len(together)
        for turn, trained in together:
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
        """Note which clients trained in a round, and whether the update of each counts."""
        size = self._engine.groups.client_size
        for client, counts in counted.items():
            ledger.add_client(client, asked=1.0 / size, received=float(counts) / size)

    def end_training(self, training: Training) -> None:
        """Add what was measured since `begin_training`, the engine's figures of the steps in it, and what
        transforms of updates have spent in it.
        """
        training.stages = added(training.stages, added(self._training, self._clock.snapshot_and_reset()))
        bubble_s, passes_s = self._engine.take_bubble()
        waits = {"bubble_s": bubble_s, "passes_s": passes_s}
        spent = self._spent()
        more = {name: amount - self._spent_before[name] for name, amount in spent.items()}
        self._spent_before = spent
        figures = added(training.figures, waits | more)
        training.figures = figures | {"step_s": self._engine.take_step_s()}

    def note_exchange(self, name: str, total: Sum, *, sent: float, waited_s: float) -> None:
        """Note what an exchange has cost.

        Args:
            sent: when it began (time.perf_counter). waited_s: how long this rank waited for it.
        """
        took_s = total.idle_s + total.exchange_s
        self._clock.trace.span("exchange", name, sent, sent + took_s)
        # Only what this rank waited is lost time. Whom a round had to wait for under staleness shows in the
        # sum of counters.
        idle_s = 0.0 if self._config.federation.staleness else min(total.idle_s, waited_s)
        done = self._exchanged
        done.exchanged_s += took_s
        done.waited_s += waited_s
        done.idle_s += idle_s
        done.travel_s += waited_s - idle_s
        done.bytes_sent += total.bytes_sent

    def share(self, ledger: Ledger, *, round: int = 0, training: Training | None = None) -> Ledger:
        """Return the ledger with everyone's values in it. Ends the round's measurement: what this sum itself
        takes counts for the next round. Collective.

        Args:
            training: of the round that is settled; None: there was no training.
        """
        before = training.stages if training else {}
        stages = added(added(before, self._between), self._clock.snapshot_and_reset())
        self._fill(ledger, stages, training)
        self._between, self._late_s, self._exchanged = {}, 0.0, Exchanged()
        own = self._engine.sum_over_client(ledger.vector)
        begin = time.perf_counter()
        total = self._link.sum(own, 0.0)
        self._late_s = min(total.idle_s, time.perf_counter() - begin)
        if training:
            self._clock.trace.span("wait", f"others of round {round}", begin, begin + total.idle_s)
        return self._ledger(total.vector)

    def record(self, round: int, asked: Sequence[int], ledger: Ledger, **known: Any) -> None:
        """Tell the monitor what a round came to.

        Args:
            asked: clients of the round. ledger: with everyone's values. known: what no ledger tells, by the
                record's names (factor_error, update_norm, ...).
        """
        steps = local_steps_of(self._config.train, self._role.cluster)
        lr = lr_at(self._config.train, max(0, round * steps - 1), self._config.federation.rounds * steps)
        self._monitor.round(round_record(ledger, round, tuple(asked), lr=lr, **known))

    def _fill(self, ledger: Ledger, stages: Seconds, training: Training | None) -> None:
        """Put what this rank has measured in its slots."""
        done = self._exchanged
        engine = self._engine
        size = self._engine.groups.client_size
        idle_s = stages["idle"] + self._late_s + done.idle_s
        ledger.set_rank(
            self._role.place,
            **registry.measured(),
            ranks=1.0,
            compute_s=stages["compute"],
            gather_s=stages["gather"],
            exchange_s=done.travel_s,
            idle_s=idle_s,
            wall_s=sum(stages.values()),
            bytes_sent=done.bytes_sent,
            peak_bytes=self._peak_bytes(),
            device_bytes=engine.device_bytes,
            loaded_bytes=engine.take_loaded(),
            stop=float(self._signals.stop()),
            renew=float(self._signals.renew()),
            exchanged_s=done.exchanged_s,
            waited_s=done.waited_s,
            **(training.figures if training else {}),
        )
        for client in self._role.clients:  # what its ranks did for it and for those who share them
            ledger.add_client(
                client,
                exchange_s=done.travel_s / size,
                idle_s=idle_s / size,
                bytes_sent=done.bytes_sent,
                peak_bytes=self._peak_bytes(),
            )

    def _ledger(self, vector) -> Ledger:
        clients = self._config.data.clients
        sums_only = self._config.routing.sums_only
        return Ledger(clients, self._role.ranks, vector, sums_only=sums_only, hides=self._hides)

"""Records of rounds, clients and runs: the values that the round loop passes to all outputs.

Rounds count from 1. A record of round 0, if there is one, contains the losses before any training. The value
of a metric (monitor/metrics) is an attribute with the metric's name: `record.train_loss`.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from fedspeed.monitor.json_form import decode, encode
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import UNITS, Metric, Value

Status = Literal["finished", "early stop", "preempted", "failed"]


class _Record:
    """A record as strict JSON: one object with its fields and the values of its metrics."""

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """Return the metrics that such a record has values of."""
        return ()

    @classmethod
    def is_always_there(cls, metric: Metric) -> bool:
        """Tell whether a record without this metric is damaged."""
        return metric.always

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build a record from its fields and metrics, by name. A metric that is left out has no value.

        Raises:
            ValueError: a name is unknown, or a value is missing that such a record always has.
        """
        metrics = {metric.name: metric for metric in cls.metrics()}
        fields = _fields(cls)
        if unknown := sorted(values.keys() - metrics.keys() - fields.keys()):
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
        needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        missing = [name for name in needed if name not in values]
        needed = [name for name, metric in metrics.items() if cls.is_always_there(metric)]
        missing += [name for name in needed if values.get(name) is None]
        if missing:
            raise ValueError(f"{cls.__name__} lacks a value of {', '.join(missing)}")
        arguments = {name: value for name, value in values.items() if name in fields}
        if metrics:
            arguments["values"] = {name: metric.value(values.get(name)) for name, metric in metrics.items()}
        return cls(**arguments)

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        fields = {name: encode(getattr(self, name)) for name in _fields(type(self))}
        values = self.__dict__.get("values", {})
        left_out = {metric.name for metric in self.metrics() if metric.task and values[metric.name] is None}
        shown = {name: encode(value) for name, value in values.items() if name not in left_out}
        return fields | shown

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Return the record of a JSON object from `to_json`. A metric that the object does not have yet has
        no value.

        Raises:
            ValueError: `values` is something else; the message names the class and the field.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} must be an object, found {type(values).__name__}")
        kinds = {name: field.type for name, field in _fields(cls).items()}
        kinds |= {metric.name: UNITS[metric.unit].kind | None for metric in cls.metrics()}
        if lacking := sorted(_fields(cls).keys() - values.keys()):
            raise ValueError(f"{cls.__name__} lacks the field {', '.join(lacking)}")
        known = {
            name: decode(value, kinds[name], f"{cls.__name__}.{name}")
            for name, value in values.items()
            if name in kinds
        }
        return cls.of(**values | known)

    def __getattr__(self, name: str) -> Any:
        """Return the value of a metric; Python calls it for a name that is no field. The type depends on the
        metric's unit.
        """
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(f"{type(self).__name__} has no field and no metric {name!r}")
        return values[name]


@dataclass(frozen=True)
class ClientRecord(_Record):
    """The record of one client in one round. Losses are means per answer token."""

    client: int
    values: Mapping[str, Value]

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """Return the metrics of a client."""
        return registry.of_client()


@dataclass(frozen=True)
class RoundRecord(_Record):
    """The record of one round, over all clients.

    Attributes:
        missing: clients whose update did not count; empty where this may not be known.
        per_client: records of single clients; empty in masked modes.
    """

    round: int
    values: Mapping[str, Value]
    missing: tuple[int, ...] = ()
    per_client: tuple[ClientRecord, ...] = ()

    def __post_init__(self) -> None:
        assert 0 <= self.received <= self.clients, f"{self.received} updates of {self.clients} clients"
        assert len(self.missing) in (0, self.missing_count), (
            f"missing clients {self.missing}, but {self.missing_count} missing updates"
        )

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """Return the metrics of a round."""
        return registry.of_round()

    @property
    def missing_count(self) -> int:
        """Return the number of requested updates that did not count."""
        return int(self.clients - self.received)

    @property
    def other_s(self) -> float:
        """Return the seconds of the round's wall time that belong to no stage."""
        return max(0.0, self.seconds - self.compute_s - self.gather_s - self.exchange_s - self.idle_s)


@dataclass(frozen=True)
class MissingUpdates(_Record):
    """Updates of one round that did not count. `clients` is empty where only their number may be known."""

    round: int
    count: int
    clients: tuple[int, ...] = ()


@dataclass(frozen=True)
class Summary(_Record):
    """The result of a run, over all its restarts.

    Attributes:
        rounds: finished rounds.
        total_rounds: configured rounds.
        reason: why the run ended, in one sentence; may be empty for a run that has finished.
        best_round: the round with the best held-out loss; 0: no round improved on the start.
        values: of the metrics, over all rounds. Seconds include the rounds only, not the start of the run.
        absent: finished rounds whose records are lost; they are missing from all other values.
    """

    status: Status
    rounds: int
    total_rounds: int
    reason: str
    exit_code: int
    first_val_loss: float | None
    last_val_loss: float | None
    best_val_loss: float | None
    best_round: int | None
    restarts: int
    values: Mapping[str, Value]
    missing: tuple[MissingUpdates, ...] = ()
    absent: tuple[int, ...] = ()

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """Return the metrics of a run."""
        return registry.of_summary()

    @classmethod
    def is_always_there(cls, metric: Metric) -> bool:
        """Tell whether a summary without this metric is damaged."""
        return metric.always and metric.over_rounds == "sum"

    @property
    def missing_count(self) -> int:
        """Return the number of updates that did not count, in all rounds."""
        return sum(gap.count for gap in self.missing)


def lost_rounds(records: Iterable[RoundRecord], newest: int) -> tuple[int, ...]:
    """Return the rounds up to `newest`, the last one in the journal (-1: none), that have no record."""
    known = {record.round for record in records}
    return tuple(number for number in range(newest + 1) if number not in known)


def lost_rounds_text(absent: tuple[int, ...]) -> str:
    """Describe which records are lost: `the records of rounds 0 to 2 and 5 are missing`."""
    spans: list[list[int]] = []
    for number in absent:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    names = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    if len(absent) == 1:
        return f"the record of round {names[0]} is missing"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"the records of rounds {listed} are missing"


def finished_rounds(records: Sequence[RoundRecord], absent: tuple[int, ...]) -> int:
    """Return the number of the last finished round, or -1 if there is none."""
    return max([*(record.round for record in records[-1:]), *absent[-1:]], default=-1)


def summarise(
    records: Sequence[RoundRecord],
    *,
    status: Status,
    total_rounds: int,
    reason: str = "",
    exit_code: int = 0,
    restarts: int = 0,
    also_missing: tuple[MissingUpdates, ...] = (),
    absent: tuple[int, ...] = (),
) -> Summary:
    """Summarise the records of a run.

    Args:
        records: all finished rounds in order, including those before a restart.
        also_missing: updates that were missing in a round that has no record because it did not finish.
        absent: finished rounds whose records are lost.
    """
    evaluated = [record for record in records if record.val_loss is not None]
    # A loss that is not finite can be first or last, but never best. The loss of round 0 can be best: then no
    # round improved on the start.
    finite = [record for record in evaluated if math.isfinite(record.val_loss)]
    best = min(finite, key=lambda record: record.val_loss, default=None)
    # If earlier records are lost, the first known loss is not the first one.
    has_first = bool(evaluated) and not any(number < evaluated[0].round for number in absent)
    gaps = [
        MissingUpdates(record.round, record.missing_count, record.missing)
        for record in records
        if record.missing_count
    ]
    return Summary(
        status=status,
        rounds=max(0, finished_rounds(records, absent)),
        total_rounds=total_rounds,
        reason=reason,
        exit_code=exit_code,
        first_val_loss=evaluated[0].val_loss if has_first else None,
        last_val_loss=_last(records, "val_loss", absent),
        best_val_loss=best.val_loss if best else None,
        best_round=best.round if best else None,
        restarts=restarts,
        values=_over_rounds(records, absent),
        missing=(*gaps, *also_missing),
        absent=tuple(absent),
    )


def _over_rounds(records: Sequence[RoundRecord], absent: tuple[int, ...]) -> dict[str, Value]:
    """Reduce each metric of the summary over all rounds."""
    values: dict[str, Value] = {}
    for metric in registry.of_summary():
        known = [value for record in records if (value := getattr(record, metric.name)) is not None]
        match metric.over_rounds:
            case "sum":
                amount = sum(known) if known or metric.always else None
            case "max":
                amount = max(known, default=None)
            case "median":
                amount = statistics.median(known) if known else None
            case "last":
                amount = _last(records, metric.name, absent)
            case "ratio":
                whole = values.get(metric.over)
                part = values.get(metric.of)
                amount = part / whole if whole and part is not None else None
        values[metric.name] = metric.value(amount)
    return values


def _last(records: Sequence[RoundRecord], name: str, absent: tuple[int, ...]) -> Value:
    """Return the last measured value, or None if a later one may be lost."""
    measured = [record for record in records if getattr(record, name) is not None]
    if not measured or any(number > measured[-1].round for number in absent):
        return None
    return getattr(measured[-1], name)


def _fields(kind: Any) -> dict[str, dataclasses.Field]:
    """Return the fields of a record class, without the values of metrics."""
    return {field.name: field for field in dataclasses.fields(kind) if field.name != "values"}

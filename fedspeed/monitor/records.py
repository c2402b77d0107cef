"""The values that travel from the round loop to everything a user sees.

Rounds count from 1. A record of round 0, if there is one, holds the losses before any training. What a record
knows of a metric (monitor/metrics) is an attribute of the metric's name: `record.train_loss`.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedspeed.monitor.json_form import decode, encode
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import UNITS, Metric, Value

Status = Literal["finished", "early stop", "preempted", "failed"]


class _Record:
    """Plain-dict form of the dataclasses below: strict JSON, with the values of metrics beside the fields."""

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """The metrics that it holds values of."""
        return ()

    @classmethod
    def is_always_there(cls, metric: Metric) -> bool:
        """Whether a record without this metric is damaged."""
        return metric.always

    @classmethod
    def of(cls, **values):
        """Build a record from its fields and metrics by name. Of a metric that is left out there is no value.

        Raises:
            ValueError: there is no such name, or a value is missing that such a record always has.
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
        own = {name: value for name, value in values.items() if name in fields}
        if metrics:
            own["values"] = {name: metric.value(values.get(name)) for name, metric in metrics.items()}
        return cls(**own)

    def to_json(self) -> dict:
        """Turn the record into what `from_json` takes."""
        own = {name: encode(getattr(self, name)) for name in _fields(type(self))}
        return own | {name: encode(value) for name, value in self.__dict__.get("values", {}).items()}

    @classmethod
    def from_json(cls, values: dict):
        """Read what `to_json` writes. Of a metric that is younger than the record there is no value.

        Raises:
            ValueError: `values` is something else; the class and the field are named.
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

    def __getattr__(self, name: str) -> Value:
        """The value of a metric. Asked for what is no field."""
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(f"{type(self).__name__} has no field and no metric {name!r}")
        return values[name]


@dataclass(frozen=True)
class ClientRecord(_Record):
    """What one client did in one round. Seconds are means over the client's ranks; losses are means per
    answer token.

    Exchange, idle, bytes and memory are those of its ranks, which clients may share.
    """

    client: int
    values: Mapping[str, Value]

    @classmethod
    def metrics(cls):
        return registry.of_client()


@dataclass(frozen=True)
class RoundRecord(_Record):
    """One round over all clients.

    Attributes:
        missing: clients whose update did not count, where it may be known.
        per_client: empty in the masked modes.
    """

    round: int
    values: Mapping[str, Value]
    missing: tuple[int, ...] = ()
    per_client: tuple[ClientRecord, ...] = ()

    def __post_init__(self):
        assert 0 <= self.received <= self.clients, f"{self.received} updates of {self.clients} clients"
        assert len(self.missing) in (0, self.missing_count), (
            f"missing clients {self.missing}, but {self.missing_count} missing updates"
        )

    @classmethod
    def metrics(cls):
        return registry.of_round()

    @property
    def missing_count(self) -> int:
        """Updates that were asked for and did not count."""
        return self.clients - self.received

    @property
    def other_s(self) -> float:
        """The part of the round's wall time that no stage accounts for."""
        return max(0.0, self.seconds - self.compute_s - self.gather_s - self.exchange_s - self.idle_s)


@dataclass(frozen=True)
class MissingUpdates(_Record):
    """Updates of one round that never counted. `clients` is empty where only their number may be known."""

    round: int
    count: int
    clients: tuple[int, ...] = ()


@dataclass(frozen=True)
class Summary(_Record):
    """How a run ended, over all its restarts.

    Attributes:
        rounds: finished; total_rounds: asked for.
        reason: one sentence; may be empty for a run that simply finished.
        best_round: 0: no round beat the start.
        values: of the metrics, over all rounds. Seconds are those of rounds; start-up is not in them.
        absent: rounds that finished, but whose records are lost: no other number here knows of them.
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
    def metrics(cls):
        return registry.of_summary()

    @classmethod
    def is_always_there(cls, metric):
        return metric.always and metric.over_rounds == "sum"

    @property
    def missing_count(self) -> int:
        """Updates that did not count, of all rounds."""
        return sum(gap.count for gap in self.missing)


def lost_rounds(records, newest: int) -> tuple[int, ...]:
    """Find the rounds up to `newest`, which is in the journal, that have no record; none for -1, an empty
    journal.
    """
    known = {record.round for record in records}
    return tuple(number for number in range(newest + 1) if number not in known)


def lost_rounds_text(absent: tuple[int, ...]) -> str:
    """Say which records are lost: `the records of rounds 0 to 2 and 5 are missing`."""
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


def finished_rounds(records, absent: tuple[int, ...]) -> int:
    """Find the number of the last round that finished, -1 for none."""
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
    """Add the records of a run up.

    Args:
        records: all rounds that finished, in order, those before a restart too.
        also_missing: updates that were missing in a round that did not finish and therefore has no record.
        absent: rounds that finished, but whose records are lost.
    """
    evaluated = [record for record in records if record.val_loss is not None]
    # A loss that is not finite can be first or last, but never best. That of round 0, in which nothing was
    # trained, can: no round beat the start then.
    finite = [record for record in evaluated if math.isfinite(record.val_loss)]
    best = min(finite, key=lambda record: record.val_loss, default=None)
    # A later loss must not pass for the first one.
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
    """Reduce each metric of the summary over the rounds."""
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
    """The last value that was measured; None if a later one may be lost."""
    measured = [record for record in records if getattr(record, name) is not None]
    if not measured or any(number > measured[-1].round for number in absent):
        return None
    return getattr(measured[-1], name)


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    """The fields of a record beside the values of metrics."""
    return {field.name: field for field in dataclasses.fields(kind) if field.name != "values"}

"""The values that travel from the round loop to everything a user sees, and the rule that says which of them may be shown.

Rounds count from 1. A record of round 0, if there is one, holds the losses before any training.

All JSON written from here is strict: a number that is not finite becomes one of the strings "NaN", "Infinity" and "-Infinity" (as in the
JSON form of protobuf), so that a diverged loss stays different from one that was not measured (null), and comes back as it was.
"""

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
HIDDEN_REASON = "the details stay on the host where it happened"

Status = Literal["finished", "early stop", "preempted", "failed"]


class _Record:
    """Plain-dict form of the dataclasses below."""

    def to_json(self) -> dict:
        return {field.name: _encode(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: dict):
        """Raises ValueError that names the class and the field if `values` is not what `to_json` writes."""
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{cls.__name__} needs exactly the fields {sorted(kinds)}, found {found}")
        return cls(**{name: _decode(values[name], kind, f"{cls.__name__}.{name}") for name, kind in kinds.items()})


@dataclass(frozen=True)
class ClientRecord(_Record):
    """What one client did in one round. Seconds are means over the client's ranks; losses are means per answer token.

    Exchange, idle, bytes and memory are those of its ranks, which clients may share.
    """

    client: int
    train_loss: float | None
    val_loss: float | None  # None: not evaluated in this round
    tokens: int  # trained
    local_steps: int
    compute_s: float
    gather_s: float
    exchange_s: float
    idle_s: float
    bytes_sent: int
    peak_bytes: int  # of its ranks together


@dataclass(frozen=True)
class RoundRecord(_Record):
    """One round over all clients."""

    round: int
    train_loss: float | None  # mean per answer token over the clients; None: nothing was trained
    val_loss: float | None  # the same on held-out rows; None: not evaluated in this round
    tokens: int  # trained, all clients together
    tokens_per_s: float  # tokens / seconds
    seconds: float  # wall time of the round, with what was done since the last one: mean over the ranks
    compute_s: float  # this and the next three: means over the ranks, so that they add up to at most `seconds`
    gather_s: float
    exchange_s: float
    idle_s: float
    bytes_sent: int  # by all gateways together, in the exchange of updates
    peak_bytes: int | None  # largest over the ranks; None: not shown
    lr: float
    factor_error: float | None  # relative error of averaging A and B apart from each other; None: not defined for this aggregation
    update_norm: float | None  # Euclidean norm of the aggregated update; under svd of the change of the products B A
    clients: int  # asked for an update
    received: int  # updates that counted
    loaded_bytes: int = 0  # of the frozen base, onto the devices of all ranks, from the run's tier; waiting for it is gather_s
    device_bytes: int | None = None  # most that tensors took on a device, largest over the ranks; None: not measured or not shown
    step_s: float | None = None  # of a local step, on the slowest rank; None: no step was timed, or not shown
    bubble: float | None = None  # part of a pipeline's training passes in which its ranks did not compute; None: there is no pipeline
    overlap: float | None = None  # part of the exchange that hid behind training; None: there was none
    factor_error_exact: bool = False  # else it is an estimate, from random probes, of which the first digit counts
    clipped: int = 0  # values of all updates that were beyond what a masked sum carries, and counted for less: a member told a wrong size
    missing: tuple[int, ...] = ()  # clients whose update did not count, where it may be known
    per_client: tuple[ClientRecord, ...] = ()  # empty in the masked modes

    def __post_init__(self):
        assert 0 <= self.received <= self.clients, f"{self.received} updates of {self.clients} clients"
        assert len(self.missing) in (0, self.missing_count), f"missing clients {self.missing}, but {self.missing_count} missing updates"

    @property
    def missing_count(self) -> int:
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
    """How a run ended, over all its restarts."""

    status: Status
    rounds: int  # finished
    total_rounds: int  # asked for
    reason: str  # one sentence; may be empty for a run that simply finished
    exit_code: int
    first_val_loss: float | None
    last_val_loss: float | None
    best_val_loss: float | None
    best_round: int | None  # 0: no round beat the start
    seconds: float  # wall time of the rounds; start-up is not in it
    tokens: int
    bytes_sent: int
    peak_bytes: int | None
    restarts: int
    loaded_bytes: int = 0
    device_bytes: int | None = None
    step_s: float | None = None  # median over the rounds, and so are the next two, see RoundRecord
    bubble: float | None = None
    overlap: float | None = None
    clipped: int = 0
    missing: tuple[MissingUpdates, ...] = ()
    absent: tuple[int, ...] = ()  # rounds that finished, but whose records are lost: no other number here knows of them

    @property
    def missing_count(self) -> int:
        return sum(gap.count for gap in self.missing)


def absent_rounds(records, newest: int) -> tuple[int, ...]:
    """The rounds up to `newest`, which is in the journal, that have no record; none for -1, an empty journal."""
    known = {record.round for record in records}
    return tuple(number for number in range(newest + 1) if number not in known)


def absent_text(absent: tuple[int, ...]) -> str:
    """`the records of rounds 0 to 2 and 5 are missing`."""
    spans: list[list[int]] = []
    for number in absent:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    names = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"the records of rounds {listed} are missing" if len(absent) > 1 else f"the record of round {listed} is missing"


def finished_rounds(records, absent: tuple[int, ...]) -> int:
    """The number of the last round that finished, -1 for none."""
    return max([*(record.round for record in records[-1:]), *absent[-1:]], default=-1)


def summarise(
    records, *, status: Status, total_rounds: int, reason: str = "", exit_code: int = 0, restarts: int = 0,
    also_missing: tuple[MissingUpdates, ...] = (), absent: tuple[int, ...] = (),
) -> Summary:
    """Add the records of a run up.

    Args:
        records: all rounds that finished, in order, those before a restart too.
        also_missing: updates that were missing in a round that did not finish and therefore has no record.
        absent: rounds that finished, but whose records are lost.
    """
    evaluated = [record for record in records if record.val_loss is not None]
    # A loss that is not finite can be first or last, but never best. That of round 0, in which nothing was trained, can: no round beat the start then.
    best = min((record for record in evaluated if math.isfinite(record.val_loss)), key=lambda record: record.val_loss, default=None)
    gaps = tuple(MissingUpdates(record.round, record.missing_count, record.missing) for record in records if record.missing_count)
    return Summary(
        status=status,
        rounds=max(0, finished_rounds(records, absent)),
        total_rounds=total_rounds,
        reason=reason,
        exit_code=exit_code,
        # A later loss must not pass for the first one, nor an earlier one for the last.
        first_val_loss=evaluated[0].val_loss if evaluated and not any(number < evaluated[0].round for number in absent) else None,
        last_val_loss=evaluated[-1].val_loss if evaluated and not any(number > evaluated[-1].round for number in absent) else None,
        best_val_loss=best.val_loss if best else None,
        best_round=best.round if best else None,
        seconds=sum(record.seconds for record in records),
        tokens=sum(record.tokens for record in records),
        bytes_sent=sum(record.bytes_sent for record in records),
        peak_bytes=max((record.peak_bytes for record in records if record.peak_bytes is not None), default=None),
        restarts=restarts,
        loaded_bytes=sum(record.loaded_bytes for record in records),
        device_bytes=max((record.device_bytes for record in records if record.device_bytes is not None), default=None),
        **{name: _median([getattr(record, name) for record in records]) for name in ("step_s", "bubble", "overlap")},
        clipped=sum(record.clipped for record in records),
        missing=gaps + tuple(also_missing),
        absent=tuple(absent),
    )


def shows_everything(routing_mode: str) -> bool:
    """True where every client may see what every other one does. Any mode but `plain` is masked, one we do not know yet included."""
    return routing_mode == "plain"


def visible(record, routing_mode: str):
    """The part of a RoundRecord or Summary that outputs may show: in `plain` all of it, in masked modes only counts and sums.

    A mean is a sum over a count and stays. A maximum over ranks is one client's own value, so the peak memory goes. The text of a failure
    may name a host or a client, so it stays where it happened. Idempotent.
    """
    if shows_everything(routing_mode):
        return record
    if isinstance(record, RoundRecord):
        return dataclasses.replace(record, missing=(), per_client=(), peak_bytes=None, device_bytes=None, step_s=None)
    told = record.status in ("finished", "early stop")
    return dataclasses.replace(
        record,
        reason=record.reason if told else HIDDEN_REASON,
        peak_bytes=None,
        device_bytes=None,
        step_s=None,
        missing=tuple(dataclasses.replace(gap, clients=()) for gap in record.missing),
    )


def _encode(value):
    if isinstance(value, _Record):
        return value.to_json()
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value, kind, place: str):
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{place} must be a list, found {value!r}")
        return tuple(_decode(item, get_args(kind)[0], place) for item in value)
    if dataclasses.is_dataclass(kind):
        return kind.from_json(value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{place} must be one of {list(get_args(kind))}, found {value!r}")
        return value
    allowed = get_args(kind) or (kind,)
    if float in allowed and isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    if float in allowed and type(value) is int:
        return float(value)
    if isinstance(value, bool) is not (bool in allowed) or not isinstance(value, allowed):
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"{place} must be {expected}, found {value!r}")  # noqa: TRY004 (bad input, not a wrong call)
    return value


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None

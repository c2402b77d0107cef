"""The description of a metric: who measures it, how it becomes one number, and where it is shown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedspeed.units import bytes_text, count_text, loss_text, seconds_text

Value = float | int | bool | None  # None: not measured, or not to be shown
GIB = 2**30
# Information about a client's training that it sends in addition to its update, and that a transform of
# updates may have to hide (federation.updates): its losses, its exact weight (answer tokens), and the sketch
# from which the averaging error is estimated.
LOSSES = "losses"
WEIGHTS = "weights"
SKETCH = "sketch"
REVEALABLE = frozenset({LOSSES, WEIGHTS, SKETCH})
NOTHING: frozenset[str] = frozenset()


class Unit(NamedTuple):
    """The type of values in records and JSON, and their text for people."""

    kind: type
    text: Callable[[float], str]


UNITS = {
    "loss": Unit(float, loss_text),  # nats per answer token
    "accuracy": Unit(float, lambda share: f"{100 * share:.1f} %"),  # in [0, 1]
    "share": Unit(float, lambda share: f"{share:.0%}"),  # in [0, 1]
    "seconds": Unit(float, seconds_text),
    "tokens": Unit(int, count_text),
    "tokens/s": Unit(float, count_text),
    "bytes": Unit(int, bytes_text),
    "count": Unit(int, str),
    "number": Unit(float, lambda value: f"{value:.3g}"),
    "flag": Unit(bool, str),
}

REDUCTIONS = {"client": ("sum", "ratio"), "rank": ("sum", "mean", "max", "ratio"), "round": ("ratio", "same")}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Describe one metric. Ledger slots, fields of records, tags, tables and visibility follow from it.

    A metric is private by default: in masked modes its value does not leave the rank that has measured it
    unless `shown_masked` is set, and the value of a single client never does. If a transform of updates hides
    anything, it does not leave that rank in any mode unless `reveals` is narrower.

    Attributes:
        name: the field in records, `rounds.jsonl` and `--json`. unit: one of UNITS. per: who measures it.
            `client`: ranks add values for each client, whose value is the sum over its ranks.
            `rank`: every rank measures its own value. `round`: it is no sum of the ledger.
        reduce: how it becomes one number. `sum`, `mean` and `max` are over the clients or ranks; `ratio`
            divides two sums over them, or for `round` two metrics of the round; `same` is equal on all ranks.
            A maximum of 0 stands for a value that no rank has measured.
        of: the slot of the ledger with its values, or with the numerator; empty: the slot has the metric's
            name. over: the slot (for `round` the metric) with the denominator of a ratio. If that is 0, there
            is no value. rest: whether the value is 1 minus the ratio. record: which record has it: that of
            the `round`, of each `client` (per `client` only), or `both`. always: whether every round has it,
            so that a record without it is damaged. shown_masked: whether masked modes may show it. Never for
            a maximum, which is the value of one rank. reveals: the information about a client's training, of
            REVEALABLE, in its value or one of its slots. tag: of TensorBoard, with the prefix `client_N/` for
            a client. Empty: none. tag_scale: TensorBoard shows the value divided by it. tag_from: smaller
            values have no point in TensorBoard. column: its heading in the tables of rounds and of clients in
            the report. Empty: no column. over_rounds: how the values of all rounds become one of the summary:
            `sum`, `max`, `median`, `last`,
            or the `ratio` of two values of the summary. Empty: the summary does not have it.
        title: its row among the results in the report. Empty: no row.
        row_from: smaller values have no row there.
        panel: label of its chart in `report.png`. Empty: no chart.
        task: the evaluation task whose score it is; empty: of no task. Only runs with this task have its
            slots, and a record without its value leaves it out.
        measure: called on every rank at the end of each round (per `rank` only). None: other code passes the
            value to the ledger (`set_rank` or `add_client`), or for `same` to the record.

    Raises:
        ValueError: the attributes contradict each other.
    """

    name: str
    unit: str
    per: Literal["client", "rank", "round"]
    reduce: Literal["sum", "mean", "max", "ratio", "same"]
    of: str = ""
    over: str = ""
    rest: bool = False
    record: Literal["round", "client", "both"] = "round"
    always: bool = False
    shown_masked: bool = False
    reveals: frozenset[str] = REVEALABLE
    tag: str = ""
    tag_scale: float = 1.0
    tag_from: float | None = None
    column: str = ""
    over_rounds: Literal["", "sum", "max", "median", "last", "ratio"] = ""
    title: str = ""
    row_from: float | None = None
    panel: str = ""
    task: str = ""
    measure: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        allowed = REDUCTIONS.get(self.per, ())
        is_ratio = self.reduce == "ratio"
        is_hidden = not self.shown_masked
        measures_wrongly = self.measure is not None and (self.per != "rank" or is_ratio)
        faults = {
            f"unit is {self.unit!r}, but must be one of {', '.join(UNITS)}": self.unit not in UNITS,
            f"per={self.per!r} cannot be reduced by {self.reduce!r}": self.reduce not in allowed,
            "a ratio has a denominator (over=), and nothing else has": is_ratio != bool(self.over),
            "only a client's metric is in a client's record": self.record != "round" and self.per != "client",
            "masked modes never show a maximum, one rank's own value": not is_hidden and self.reduce == "max",
            "masked modes never show a client's own value": not is_hidden and self.record == "client",
            "what every round has (always=True) masked modes have too": self.always
            and is_hidden
            and self.record != "client",
            f"reveals {sorted(self.reveals - REVEALABLE)}, but can reveal {sorted(REVEALABLE)}": bool(
                self.reveals - REVEALABLE
            ),
            "what every round has (always=True) reveals nothing that may have to be hidden": self.always
            and bool(self.reveals),
            "only a rank can measure by itself, and one number": measures_wrongly,
        }
        if found := [text for text, is_so in faults.items() if is_so]:
            raise ValueError(f"metric {self.name!r}: {'; '.join(found)}")

    @property
    def slots(self) -> tuple[str, ...]:
        """Return the slots of the ledger that its value is computed from: of clients or ranks, see `per`."""
        if self.per == "round":
            return ()
        return tuple(slot for slot in (self.of or self.name, self.over) if slot)

    def value(self, amount: float | None) -> Value:
        """Convert a number to the type of the unit; None stays None."""
        kind = UNITS[self.unit].kind
        if amount is None or isinstance(amount, kind):
            return amount
        return round(amount) if kind is int else kind(amount)

    def text(self, value: Value) -> str:
        """Format a value for people, as a dash if there is none."""
        return "-" if value is None else UNITS[self.unit].text(value)

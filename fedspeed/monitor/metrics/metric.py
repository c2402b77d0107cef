"""What a metric is: who measures it, how it becomes one number of a round, and where it is shown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedspeed.units import bytes_text, count_text, loss_text, seconds_text

Value = float | int | bool | None  # None: not measured, or not to be shown
GIB = 2**30
# What is told of a client's training beside its update, and what a transform of updates may want hidden with
# it (federation.updates): its losses, its exact weight (answer tokens), and the sketch that the averaging
# error is estimated from.
LOSSES = "losses"
WEIGHTS = "weights"
SKETCH = "sketch"
REVEALABLE = frozenset({LOSSES, WEIGHTS, SKETCH})
NOTHING: frozenset[str] = frozenset()


class Unit(NamedTuple):
    """How values are kept and read: the type they have in records and JSON, and their text for people."""

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
    """Describe one metric; ledger slots, fields of records, tags, tables and visibility follow from it.

    A metric fails closed: unless `shown_masked` says otherwise, its value does not leave the rank that has
    measured it in masked modes. The value of a single client never does. And unless `reveals` says otherwise,
    it does not leave that rank in any mode where a transform of updates hides anything.

    Attributes:
        name: of the field in records, `rounds.jsonl` and `--json`.
        unit: one of UNITS.
        per: who knows it. `client`: ranks add what they have done for each client, so that a client's value
            is the sum over its ranks. `rank`: every rank says it of itself. `round`: it is no sum of the
            ledger.
        reduce: how it becomes one number. `sum`, `mean` and `max` are over the clients or ranks; `ratio`
            divides two sums over them, or for `round` two metrics of the round; `same` is known to every rank
            alike. A maximum of 0 stands for a value that nobody has measured.
        of: slot of the ledger that holds it, or the numerator; empty if it is called as the metric.
        over: of a ratio, the slot (for `round` the metric) of the denominator. Where it is 0, there is no
            value.
        rest: whether a ratio stands for what is missing to 1.
        record: whose record has it: that of the `round`, of each `client` (per `client` only), or `both`.
        always: whether every round has it, so that a record without it is damaged.
        shown_masked: whether masked modes may show it. Never for a maximum, which is one rank's own value.
        reveals: what its value, or one of its slots, tells of a client's training, of REVEALABLE.
        tag: of TensorBoard; a client's stands behind `client_N/`. Empty: none.
        tag_scale: TensorBoard shows the value divided by it.
        tag_from: values below have no point in TensorBoard.
        column: its heading in the tables of rounds and of clients in the report. Empty: no column.
        over_rounds: how the values of all rounds become one of the summary: `sum`, `max`, `median`, `last`,
            or the `ratio` of the summary's own values. Empty: the summary is without it.
        title: its row among the results in the report. Empty: no row.
        row_from: values below have no row there.
        panel: label of its chart in `report.png`. Empty: no chart.
        measure: asked on every rank at the end of each round (per `rank` only). None: whoever knows it tells
            the ledger, by `set_rank` or `add_client`, or for `same` the record.

    Raises:
        ValueError: the parts contradict each other.
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
    measure: Callable[[], float] | None = None

    def __post_init__(self):
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
        """The slots of the ledger that it is made of: those of a client or of a rank, see `per`."""
        if self.per == "round":
            return ()
        return tuple(slot for slot in (self.of or self.name, self.over) if slot)

    def value(self, amount: float | None) -> Value:
        """Give a number the type of the unit; None stays."""
        kind = UNITS[self.unit].kind
        if amount is None or isinstance(amount, kind):
            return amount
        return round(amount) if kind is int else kind(amount)

    def text(self, value: Value) -> str:
        """Write a value for people; a dash where there is none."""
        return "-" if value is None else UNITS[self.unit].text(value)

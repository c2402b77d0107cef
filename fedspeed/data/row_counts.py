"""Counts of rows that are used whole, and of those that data.max_tokens truncates or removes. Pure."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

WARN_ABOVE = 0.01  # share of rows that lose some of their answer
CLIENTS_NAMED = 16  # at most, in messages


@dataclass(frozen=True)
class RowCounts:
    """Counts of training and held-out rows together, of one client or of several.

    Attributes:
        rows: number of rows that were read.
        cut: rows whose answer data.max_tokens truncates. They are used, but cannot be answered exactly.
        lost: rows without any answer token within data.max_tokens. They are not used.
        dropped: rows that are not used because data.too_long does not cut their answer.
        kept_end: rows whose prompt lacks its beginning. Their answer is whole.
        packed, sequences: training rows, and the sequences that data.packing puts them into; 0 without it.
    """

    rows: int
    cut: int
    lost: int
    dropped: int = 0
    kept_end: int = 0
    packed: int = 0
    sequences: int = 0

    def __add__(self, other: "RowCounts") -> "RowCounts":
        return RowCounts(*(a + b for a, b in zip(count_values(self), count_values(other))))

    @property
    def kept(self) -> int:
        """Return the number of rows that are used."""
        return self.rows - self.lost - self.dropped

    @property
    def harmed(self) -> float:
        """Return the share of rows that lose some or all of their answer."""
        return (self.cut + self.lost + self.dropped) / self.rows if self.rows else 0.0


COUNTS = len(fields(RowCounts))  # numbers of a client


@dataclass(frozen=True)
class RowTable:
    """The counts of all rows of a run.

    Attributes:
        total: over all clients. clients: by client number; empty where only sums may be known.
        max_tokens: the setting data.max_tokens.
    """

    total: RowCounts
    clients: tuple[RowCounts, ...]
    max_tokens: int

    @classmethod
    def of(cls, clients: Sequence[RowCounts], max_tokens: int) -> "RowTable":
        """Return the table of all clients' counts, by client number."""
        return cls(sum(clients, RowCounts(0, 0, 0)), tuple(clients), max_tokens)

    @classmethod
    def from_values(cls, values: Sequence[float], max_tokens: int, sums_only: bool) -> "RowTable":
        """Return the table from the sum over ranks of their vectors of `count_values`.

        Args:
            values: [COUNTS a client], or [COUNTS] over all clients where only sums may be known
                (`sums_only`).
        """
        numbers = [round(value) for value in values]
        clients = [RowCounts(*numbers[start : start + COUNTS]) for start in range(0, len(numbers), COUNTS)]
        return cls(clients[0], (), max_tokens) if sums_only else cls.of(clients, max_tokens)

    def line(self) -> str:
        """Return the totals as text: `7473 rows: 7452 kept, 2057 of them cut (...); 21 lost (...)`."""
        cut = f"the end of the answer lies beyond data.max_tokens={self.max_tokens}"
        text = counts_text(self.total, cut, lost="nothing of the answer lies within it")
        if not self.total.sequences:
            return text
        return (
            f"{text}; {self.total.packed} training rows packed into {self.total.sequences} sequences of up "
            f"to {self.max_tokens} tokens (data.packing)"
        )

    def client_lines(self) -> list[str]:
        """Return a line for each of the first clients; none if no row is harmed, or only sums are known."""
        if not self.total.harmed and not self.total.kept_end:
            return []
        named = self.clients[:CLIENTS_NAMED]
        lines = [f"client {client}: {counts_text(counts)}" for client, counts in enumerate(named)]
        if len(self.clients) > len(named):
            lines.append(f"and {len(self.clients) - len(named)} more clients")
        return lines

    def warnings(self) -> list[str]:
        """Return a warning if the share of harmed rows, over all clients or at one, is above WARN_ABOVE."""
        shares = [counts.harmed for counts in self.clients]
        if max([self.total.harmed, *shares]) <= WARN_ABOVE:
            return []
        total = self.total
        losses = []
        if total.cut:
            cut = _share(total.cut, total.rows)
            losses.append(f"the end of the answer from {cut}, so that the model does not learn to stop there")
        if total.lost:
            losses.append(f"the whole answer from {_share(total.lost, total.rows)}, which are left out")
        if total.dropped:
            losses.append(f"{_share(total.dropped, total.rows)} as a whole (data.too_long)")
        where = ""
        if len(shares) > 1:
            where = f" (most at client {shares.index(max(shares))}: {_percent(max(shares))})"
        effect = f"data.max_tokens={self.max_tokens} takes {', and '.join(losses)}{where}"
        return [f"{effect}; raise it, or shorten the rows"]


@dataclass(frozen=True)
class DataReport:
    """Counts of the rows of a run and remarks on them, shown in the dry run, at the start and in the report.

    Attributes:
        row_remarks: remarks of data.row_remarks.
    """

    table: RowTable
    row_remarks: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """Return all warnings and remarks."""
        return [*self.table.warnings(), *self.row_remarks]


def count_values(counts: RowCounts) -> tuple[int, ...]:
    """Return one client's counts as the COUNTS values of the vector that `RowTable.from_values` reads."""
    return astuple(counts)


def counts_text(counts: RowCounts, cut: str = "", lost: str = "") -> str:
    """Return counts as text.

    Args:
        cut, lost: explanations to add in brackets; empty: none.
    """
    if not counts.harmed and not counts.kept_end:
        return f"{counts.rows} rows, all kept whole"
    cut_note = f" ({cut})" if cut else ""
    lost_note = f" ({lost})" if lost else ""
    kept_end = f", {counts.kept_end} with the end of the prompt only" if counts.kept_end else ""
    dropped = f"; {counts.dropped} dropped as too long" if counts.dropped else ""
    return (
        f"{counts.rows} rows: {counts.kept} kept, {counts.cut} of them cut{cut_note}{kept_end}; "
        f"{counts.lost} lost{lost_note}{dropped}"
    )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} rows ({_percent(part / whole)})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

"""How many rows are trained on as they are, and what data.max_tokens takes from the others. Pure."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

WARN_ABOVE = 0.01  # share of rows that lose something; more is hardly meant
CLIENTS_NAMED = 16


@dataclass(frozen=True)
class RowCounts:
    """Counts of training and held-out rows together, of one client or of several.

    Attributes:
        rows: as they were read.
        cut: rows that have lost the end of their answer to data.max_tokens. They are used, and never answered
            exactly.
        lost: rows of which no answer token is left. They are not used.
    """

    rows: int
    cut: int
    lost: int

    def __add__(self, other: "RowCounts") -> "RowCounts":
        return RowCounts(self.rows + other.rows, self.cut + other.cut, self.lost + other.lost)

    @property
    def kept(self) -> int:
        return self.rows - self.lost

    @property
    def harmed(self) -> float:
        """Share of rows that lose some or all of their answer."""
        return (self.cut + self.lost) / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class RowTable:
    """The counts of a run.

    Attributes:
        total: over all clients.
        clients: of each client, by its number; empty where only sums may be known.
        max_tokens: data.max_tokens.
    """

    total: RowCounts
    clients: tuple[RowCounts, ...]
    max_tokens: int

    @classmethod
    def of(cls, clients: Sequence[RowCounts], max_tokens: int) -> "RowTable":
        return cls(sum(clients, RowCounts(0, 0, 0)), tuple(clients), max_tokens)

    @classmethod
    def from_words(cls, words: Sequence[float], max_tokens: int, sums_only: bool) -> "RowTable":
        """From what `words` of all clients have added up to."""
        numbers = [round(word) for word in words]
        clients = [RowCounts(*numbers[at : at + 3]) for at in range(0, len(numbers), 3)]
        return cls(clients[0], (), max_tokens) if sums_only else cls.of(clients, max_tokens)

    def line(self) -> str:
        """`7473 rows: 7452 kept, 2057 of them cut (...); 21 lost (...)`."""
        cut = f"the end of the answer lies beyond data.max_tokens={self.max_tokens}"
        return counts_text(self.total, cut, lost="nothing of the answer lies within it")

    def client_lines(self) -> list[str]:
        """A line for each of the first clients; none where nothing is cut or lost, or only sums are known."""
        if not self.total.harmed:
            return []
        named = self.clients[:CLIENTS_NAMED]
        lines = [f"client {client}: {counts_text(counts)}" for client, counts in enumerate(named)]
        if len(self.clients) > len(named):
            lines.append(f"and {len(self.clients) - len(named)} more clients")
        return lines

    def warnings(self) -> list[str]:
        """Says where more rows lose something than is likely to be meant, over all clients or at one."""
        shares = [counts.harmed for counts in self.clients]
        if max([self.total.harmed, *shares]) <= WARN_ABOVE:
            return []
        total = self.total
        taken = []
        if total.cut:
            cut = _share(total.cut, total.rows)
            taken.append(f"the end of the answer from {cut}, so that the model does not learn to stop there")
        if total.lost:
            taken.append(f"the whole answer from {_share(total.lost, total.rows)}, which are left out")
        where = ""
        if len(shares) > 1:
            where = f" (most at client {shares.index(max(shares))}: {_percent(max(shares))})"
        told = f"data.max_tokens={self.max_tokens} takes {', and '.join(taken)}{where}"
        return [f"{told}; raise it, or shorten the rows"]


@dataclass(frozen=True)
class DataReport:
    """What is said about the rows of a run: in the dry run, at its start and in its report."""

    table: RowTable
    findings: tuple[str, ...]  # see data.findings

    @property
    def notes(self) -> list[str]:
        return [*self.table.warnings(), *self.findings]


def words(counts: RowCounts) -> tuple[int, int, int]:
    """What one client adds to the sum that `RowTable.from_words` reads."""
    return astuple(counts)


def counts_text(counts: RowCounts, cut: str = "", lost: str = "") -> str:
    """The counts in words. cut, lost: what the words mean, where it is to be said."""
    if not counts.harmed:
        return f"{counts.rows} rows, all kept whole"
    cut, lost = (f" ({why})" if why else "" for why in (cut, lost))
    return f"{counts.rows} rows: {counts.kept} kept, {counts.cut} of them cut{cut}; {counts.lost} lost{lost}"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} rows ({_percent(part / whole)})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

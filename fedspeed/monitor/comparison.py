"""The comparison of the federated model with others on the same held-out items."""

from dataclasses import dataclass
from typing import NamedTuple


class ComparisonRow(NamedTuple):
    """One model of a comparison."""

    name: str
    held_out_loss: float
    accuracy: float | None  # share in [0, 1]; None: not measured


@dataclass(frozen=True)
class Comparison:
    """Several models on the same held-out items; `federated` is the name of the run's own result."""

    rows: tuple[ComparisonRow, ...]
    federated: str = "federated"


def comparison_text(comparison: Comparison) -> str:
    """Return the comparison as lines for a terminal."""
    wide = max(len(row.name) for row in comparison.rows)
    lines = []
    for row in comparison.rows:
        accuracy = "" if row.accuracy is None else f"  right answers {100 * row.accuracy:5.1f} %"
        lines.append(f"  {row.name:<{wide}}  held-out loss {row.held_out_loss:7.4f}{accuracy}")
    return "\n".join(lines)

"""The section of a run's report with the scores of its exported model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspeed.evaluation.results import scores_to_markdown
from fedspeed.files import write_atomically

HEADING = "## Evaluation of the exported model\n"


def update_report(report: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Put the scores into a report, in place of those of an earlier evaluation; do nothing where there is no
    report.
    """
    if not report.is_file():
        return
    text = report.read_text(encoding="utf-8")
    before, found, rest = text.partition(f"\n{HEADING}")
    if found:
        following = rest.partition("\n## ")
        text = f"{before}\n{following[1].lstrip(chr(10))}{following[2]}" if following[1] else f"{before}\n"
    section = f"{HEADING}\n{scores_to_markdown(results)}\n"
    write_atomically(report, f"{text.rstrip()}\n\n{section}".encode())

"""Compare every model family with transformers and PEFT alone: the same tiny random model, adapter and rows,
with all special features of the family on, in each execution.

    python benchmarks/families.py [--families gemma3_text,phi3] [--out benchmarks/results/families.md]

A few minutes on two cores; with all families it writes its tables to benchmarks/results/families.md. The
models are those of tests/engine/family_bases.py, and what is compared is in tests/engine/families.py.
"""

import argparse
import datetime
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tests.engine.families import Differences

RESULT = ROOT / "benchmarks" / "results" / "families.md"
# Name of an execution -> (kind of engine of the tests, ranks).
EXECUTIONS = {
    "stock, ZeRO-0": ("zero0", 1),
    "stock, ZeRO-3": ("zero3", 1),
    "layer-major, resident": ("resident", 1),
    "layer-major, from RAM": ("ram", 1),
    "layer-major, from NVMe": ("nvme", 1),
    "two stages, resident": ("resident", 2),
    "two stages, from RAM": ("ram", 2),
}


@dataclass(frozen=True)
class Case:
    """What a family is compared under. Of these three settings, the cases have every pair of values."""

    tied: bool
    targets: str
    padded: bool


CASES = (
    Case(tied=False, targets="all-linear", padded=True),
    Case(tied=False, targets="attention", padded=False),
    Case(tied=True, targets="all-linear", padded=False),
    Case(tied=True, targets="attention", padded=True),
)
Found = dict[tuple[str, str], list["Differences"]]  # by family and execution: of each case


def compared(rank: int, family: str, ranks: int, folder: Path) -> Found:
    """Compare a family in the executions that take so many ranks. Runs in each of these ranks."""
    import torch
    from deepspeed import comm as dist

    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.engine.families import PIPELINE, by_engine, by_transformers, compare
    from tests.engine.family_bases import write_base
    from tests.limits import LIMIT_S

    torch.set_num_threads(1)
    quiet()
    join_world(LIMIT_S)
    found: Found = {}
    options = PIPELINE if ranks > 1 else None
    for case in CASES:
        base = folder / f"{ranks}-{family}-{case.tied}"
        if rank == 0 and not base.exists():
            write_base(family, base, tied=case.tied)
        dist.barrier()
        expected = by_transformers(family, str(base), case.targets, case.padded)
        for execution, (kind, needed) in EXECUTIONS.items():
            if needed == ranks:
                measured = by_engine(
                    str(base), kind, case.targets, case.padded, ranks=ranks, options=options, nvme=folder
                )
                found.setdefault((family, execution), []).append(compare(measured, expected))
    leave_world()
    return found


def table(families: Sequence[str], title: str, cell: Callable[[str, str], str]) -> str:
    """Make a Markdown table of families and executions.

    Args:
        title: of the first column. cell: makes a cell's text from a family and an execution.
    """
    lines = [f"| {title} | {' | '.join(EXECUTIONS)} |", f"| --- |{' --: |' * len(EXECUTIONS)}"]
    for family in families:
        lines.append(f"| {family} | {' | '.join(cell(family, execution) for execution in EXECUTIONS)} |")
    return "\n".join(lines)


def report(families: Sequence[str], found: Found, command: str) -> str:
    """Make the page of results."""

    def trained(family: str, execution: str) -> str:
        cases = found[family, execution]
        largest = (max(getattr(one, name) for one in cases) for name in ("logits", "losses", "gradients"))
        return " / ".join(f"{value:.0e}" if value else "0" for value in largest)

    def generated(family: str, execution: str) -> str:
        cases = found[family, execution]
        equal = sum(one.same_answers for one in cases)
        return f"{equal} of {len(cases)}, {max(one.logprobs for one in cases):.0e}"

    return f"""# Families against transformers

{datetime.date.today()}, {hardware()}, fp32. Command: `{command}`.

Each family is a model of four blocks with random weights and all special features of the family on: sliding
windows shorter than the rows, blocks of several kinds, biases, heads wider than hidden size / heads, grouped
queries, scaled rotary embeddings, scales and caps of embedding and logits (`tests/engine/family_bases.py`).
It is compared with transformers and PEFT alone, given the same LoRA adapter and rows: untied and tied,
`all-linear` and `attention`, rows padded and not, every pair of these settings in {len(CASES)} cases. Numbers
are the largest differences of the cases, relative to the largest value that transformers gives (losses: each
to its own); rounding of fp32 is 6e-8.

Logits / losses / LoRA gradients of a step:

{table(families, "family", trained)}

Generation with cached keys and values: cases whose greedy answers, to prompts of several lengths in one batch
and to each prompt by itself, are both those of transformers' `generate` with padding on the left and those of
transformers without a cache; and the largest difference of given tokens' log-probabilities:

{table(families, "family", generated)}
"""


def hardware() -> str:
    """Describe the processor and the libraries that computed."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "deepspeed")
    )
    return f"{names[0] if names else 'unknown processor'} ({os.cpu_count()} cores), {libraries}"


def main() -> None:
    """Compare, print the page, and write it where asked."""
    import tempfile

    import tests.conftest  # noqa: F401  (settings of every test process)
    from tests.engine.family_bases import WRITTEN
    from tests.processes import run_clusters

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", default="", help="some of them, with commas between; all if left out")
    parser.add_argument("--out", type=Path, help="file to write; with all families, the page of results")
    args = parser.parse_args()
    families = tuple(args.families.split(",")) if args.families else WRITTEN
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPool(2) as pool:

        def compare(work: tuple[str, int]) -> Found:
            family, ranks = work
            return run_clusters([ranks], compared, family, ranks, Path(folder))[0]

        for part in pool.imap(compare, itertools.product(families, (1, 2))):
            print(*{family for family, _ in part}, file=sys.stderr)
            found |= part
    page = report(families, found, "python benchmarks/families.py")
    print(page)
    out = args.out or (None if args.families else RESULT)
    if out is not None:
        out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

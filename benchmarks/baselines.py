"""What every method learns from a few rows, and what it costs: FedSpeed's baselines on a small real model.

    python benchmarks/baselines.py learn [--task gsm8k|dolly] [--only METHOD,METHOD]
    python benchmarks/baselines.py cost [--only METHOD,METHOD]
    python benchmarks/baselines.py report

`learn` trains SmolLM2-135M-Instruct (bash launchers/fetch-smollm2.sh) with each method at three learning
rates, on at most 20 000 tokens a run, and reads the held-out loss before and after. `cost` measures
weights, optimizer state, activations and the bytes on the wire of each method, and compares them with the
formulas of benchmarks/baseline_formulas.py. Both keep their numbers in benchmarks/results/baselines/ and go
on where they stopped: a run that is there with the same settings is not repeated. `report` writes
benchmarks/results/baselines.md and its plot.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("learn", "cost", "report"))
    parser.add_argument("--task", choices=("gsm8k", "dolly"), help="learn: of this task only")
    parser.add_argument("--only", default="", help="methods, with commas between them")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "baselines", help="folder of the runs")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    only = [name for name in args.only.split(",") if name]
    if args.what == "learn":
        from benchmarks.baseline_learning import learn

        if not learn([args.task] if args.task else ["gsm8k", "dolly"], only, args.out):
            sys.exit("some runs have failed; the same command goes on")
    elif args.what == "cost":
        from benchmarks.baseline_costs import measure_costs

        if not measure_costs(only, args.out):
            sys.exit("some methods could not be measured; the same command goes on")
    else:
        from benchmarks.baseline_report import write_report

        sys.exit(write_report())


if __name__ == "__main__":
    main()

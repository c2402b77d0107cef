"""The overhead of FedSpeed over a plain PyTorch FedAvg loop; the same beside other systems is
`python -m benchmarks.compare outside`, whose task and measures these are.

    python benchmarks/overhead.py [--repeat 3]

Every system runs as a command of its own; each repetition runs all of them in turn. The results are seconds
from the command to the first aggregate, seconds a round (rounds 2 to 5), and the peak of resident memory
summed over all processes (RSS, and PSS, which counts shared pages once).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from benchmarks.compare.outside import task

    if arguments.plain or arguments.prepare:
        task.main(task.FEDERATION if arguments.plain else "prepare", arguments.plain or arguments.prepare)
        return 0
    from benchmarks.compare.outside.command import exit_code, run_all
    from benchmarks.compare.outside.page import text_table
    from benchmarks.compare.outside.systems import chosen

    values = run_all(chosen(()), arguments.repeat, tasks=(task.FEDERATION,))
    print(text_table(values["rows"]))
    return exit_code(values)


if __name__ == "__main__":
    sys.exit(main())

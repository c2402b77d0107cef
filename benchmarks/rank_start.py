"""The time that FedSpeed's imports save a rank that starts as a fresh interpreter, in pairs.

    python benchmarks/rank_start.py [--repeat 5]

Both sides import the same libraries, those of `fedspeed.session.components.preload`. One side imports them as
they are: with what no rank uses (`fedspeed.engine.lean_imports`); with torch's compiler, which DeepSpeed's
Muon requires; with garbage collection during the import; and with DeepSpeed's table of operators, for which
it compiles a probe.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = "from fedspeed.session.components import preload; preload()"
AS_THEY_COME = f"""
import gc
from importlib import import_module
from fedspeed.engine import lean_imports, world

gc.disable = lambda: None
lean_imports.TESTED = {{"torch": "another version"}}
world.import_deepspeed = lambda: import_module("deepspeed.runtime.zero.muon.muon_optimizer")
{OURS}
import_module("deepspeed.ops").__compatible_ops__
"""


def seconds(code: str) -> tuple[float, float]:
    """(on the clock, of the processor) of an interpreter that runs this, and of what it starts."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, stderr=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    for code in (AS_THEY_COME, OURS):
        seconds(code)  # what the first start reads from disk
    pairs = []
    for number in range(repeat):
        pairs.append((seconds(AS_THEY_COME), seconds(OURS)))
        print(
            f"{number + 1} of {repeat}: {pairs[-1][0][0]:.1f} s as they come, {pairs[-1][1][0]:.1f} s here",
            file=sys.stderr,
        )
    print(
        "| seconds | as they come | here | ratio, median of pairs (least, most) |\n| --- | ---: | ---: | "
        "---: |"
    )
    for place, what in enumerate(("on the clock", "of the processor")):
        theirs, ours = ([pair[side][place] for pair in pairs] for side in (0, 1))
        ratios = sorted(b / a for a, b in zip(theirs, ours, strict=True))
        print(
            f"| {what} | {statistics.median(theirs):.2f} | {statistics.median(ours):.2f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f}) |"
        )


if __name__ == "__main__":
    main()

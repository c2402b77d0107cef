"""The held-out loss after the last round with federation.staleness=1 compared with 0: same rounds, same
seeds, real arithmetic.

    python benchmarks/staleness_loss.py [--rounds 20] [--seeds 0,1,2] [--config ds_configs/gsm8k_small.yaml]
        [key=value ...]

The goal is a loss within 2 % of the synchronous run, or better.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def last_loss(config: str, folder: str, words: list[str]) -> float:
    done = subprocess.run(
        [
            sys.executable,
            "launch.py",
            "--config",
            config,
            "monitor.plot=false",
            "federation.compare_alone=false",
            f"run.out={folder}",
            "run.name=one",
            "--fresh",
            *words,
        ],
        cwd=ROOT,
        env={"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", **os.environ},
        capture_output=True,
        text=True,
        timeout=7200,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads((Path(folder) / "one" / "rounds.jsonl").read_text().splitlines()[-1])["val_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="ds_configs/gsm8k_small.yaml")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    found: dict[int, list[float]] = {0: [], 1: []}
    print("| seed | staleness 0 | staleness 1 | ratio |\n| ---: | ---: | ---: | ---: |")
    for seed in args.seeds.split(","):
        for staleness, losses in found.items():
            with tempfile.TemporaryDirectory() as folder:
                losses.append(
                    last_loss(
                        args.config,
                        folder,
                        [
                            *args.words,
                            f"federation.rounds={args.rounds}",
                            f"run.seed={seed}",
                            f"federation.staleness={staleness}",
                        ],
                    )
                )
        print(
            f"| {seed} | {found[0][-1]:.4f} | {found[1][-1]:.4f} | {found[1][-1] / found[0][-1]:.4f} |",
            flush=True,
        )
    print(
        f"| mean | {statistics.mean(found[0]):.4f} | {statistics.mean(found[1]):.4f} | "
        f"{statistics.mean(found[1]) / statistics.mean(found[0]):.4f} |"
    )


if __name__ == "__main__":
    main()

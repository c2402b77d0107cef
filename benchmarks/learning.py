"""What a small pretrained model learns on a published task: federated, by each client alone, and centralised.

    python benchmarks/learning.py gsm8k|dolly|codealpaca [--out runs/learning] [key=value ...]
    python benchmarks/learning.py scores [--only TASK] [--out runs/learning]
    python benchmarks/learning.py report [--out runs/learning]

Trains SmolLM2-135M-Instruct (bash launchers/fetch-smollm2.sh) as ds_configs/TASK_smol.yaml says:

federated    the clients of the YAML.
client-N     each client alone: the same local steps on the same training rows.
centralised  one client with all training rows: as many steps, each on as many rows as all clients' steps
             together, so that it trains on as many rows as the federation.
centralised-short-steps   gsm8k only: as many rows, in steps of the size of a client's.

All have the learning rate and its schedule of the YAML; a server optimizer only the federation, because there
is no mean of clients elsewhere. Every model is then evaluated on the held-out rows of all clients. `scores`
scores the models by `fedspeed eval`: GSM8K, questions by likelihood, HumanEval(-X).

The benchmark goes on where it stopped: finished runs and evaluations are not repeated, and a run resumes from
its journal. `report` writes benchmarks/results/learning.md and its plots from whatever is there; it keeps the
text of learning.md from "## Remarks" on.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TASKS = ("gsm8k", "dolly", "codealpaca")
# For a machine of two cores that other work shares: two threads that wait for each other would be slower
# than one.
MACHINE = ("model.dtype=bf16", "engine.threads=1", "cluster.local_ranks=1", "routing.mode=plain")


@dataclass(frozen=True)
class Run:
    """One training: its name, which is that of its folder, and its arguments."""

    name: str
    overrides: tuple[str, ...] = ()


def loaded_config(task: str, overrides: list[str]):
    """Return the configuration of a task's YAML, a fedspeed.config.run.RunConfig."""
    from fedspeed.config.load import load

    return load(ROOT / "ds_configs" / f"{task}_smol.yaml", overrides).config


def runs_of(task: str, config, split: Path) -> list[Run]:
    """Return the trainings of a task in their order.

    Args:
        config: of the task's YAML (RunConfig).
        split: folder with the split as files (fedspeed.data.split_files).
    """
    from fedspeed.data.split_files import HELD_OUT, train_file

    one_client = ("data.task=file", "data.clients=1", "data.split=iid", "federation.server_optimizer=none")
    clients = config.data.clients
    alone = [
        Run(
            f"client-{client}",
            (*one_client, f"data.path={split / train_file(client)}", "data.val_fraction=0"),
        )
        for client in range(clients)
    ]
    all_rows = (
        *one_client,
        f"data.path={','.join(str(split / train_file(client)) for client in range(clients))}",
        f"data.held_out={split / HELD_OUT}",
    )
    centralised = [Run("centralised", (*all_rows, f"train.accumulation={clients}"))]
    if task == "gsm8k":
        steps = config.train.local_steps * clients
        short = (*all_rows, f"train.local_steps={steps}", "federation.local_optimizer=keep")
        centralised.append(
            Run(
                "centralised-short-steps",
                (*short, f"train.warmup_steps={config.train.warmup_steps * clients}"),
            )
        )
    return [Run("federated"), *alone, *centralised]


def write_split(task: str, config, folder: Path) -> None:
    """Write the training rows of each client and the held-out rows of all, once."""
    from fedspeed.data.clients import client_rows
    from fedspeed.data.split_files import write_split as write

    if not folder.exists():
        write(folder, client_rows(config.data, config.run.seed))


def train(task: str, run: Run, folder: Path, overrides: list[str]) -> None:
    """Train one run, or resume it, unless it is finished.

    Raises:
        SystemExit: the run failed.
    """
    summary = folder / run.name / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["status"] == "finished":
        return
    command = [sys.executable, "launch.py", "--config", f"ds_configs/{task}_smol.yaml"]
    places = [f"run.out={folder}", f"run.name={run.name}", "monitor.progress=false"]
    print(f"{task}: {run.name}", flush=True)
    env = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    arguments = [*MACHINE, *places, *run.overrides, *overrides]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, check=False)
    if done.returncode:
        sys.exit(f"{task}: {run.name} ended with {done.returncode}; the same command goes on")


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=(*TASKS, "scores", "report"))
    parser.add_argument("--only", choices=TASKS, help="scores: of this task")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.task == "report":
        from benchmarks.learning_report import write_report

        return write_report(args.out, ROOT / "benchmarks" / "results")
    if args.task == "scores":
        from benchmarks.learning_scores import score

        machine = ("model.dtype=bf16", "engine.threads=1", "cluster.local_ranks=1")
        for task in [args.only] if args.only else TASKS:
            base = loaded_config(task, args.overrides).model.base
            score(task, base, args.out.resolve() / task, machine)
        return None
    from benchmarks.learning_losses import evaluate

    config = loaded_config(args.task, args.overrides)
    folder = args.out.resolve() / args.task
    write_split(args.task, config, folder / "split")
    evaluate(folder, "base", config)
    for run in runs_of(args.task, config, folder / "split"):
        train(args.task, run, folder, args.overrides)
        evaluate(folder, run.name, config)


if __name__ == "__main__":
    main()

"""Every method at three learning rates on two tasks, with a small model and few rows."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.baseline_runs import Numbers, launch, public_rows

MAX_TOKENS = 20_000  # answer tokens of a run
MACHINE = ("model.dtype=bf16", "engine.threads=1", "cluster.local_ranks=1", "routing.mode=plain")
# Few held-out rows, the same for all methods, before and after training only.
COMMON = (
    *MACHINE,
    "adapter.dropout=0",
    "data.max_val_rows=12",
    "federation.rounds=3",
    "federation.evaluate_every=3",
    "train.schedule=constant",
    "train.warmup_steps=0",
    "train.clip=0",
)
# Rows of a client in a round, by task: 3 clients with 60 rows each, 8 with 28.
ROWS = {"gsm8k": 20, "dolly": 9}


@dataclass(frozen=True)
class Trial:
    """How a method is trained.

    Attributes:
        lrs: learning rates. batch: rows of a local step. more: further arguments.
    """

    lrs: tuple[float, float, float]
    batch: int = 1
    more: tuple[str, ...] = ()


ADAM = (1e-3, 3e-3, 1e-2)
SGD = (0.03, 0.1, 0.3)
STEPS = ("federation.round_budget=steps",)
PUBLIC = "federation.public_rows=runs/baselines/public-{task}.jsonl"  # `public_rows` writes it
TRIALS: dict[str, Trial] = {
    "fedavg_lora": Trial(ADAM),
    "zero3_offload": Trial(ADAM),
    "fs_llm": Trial(SGD),
    "fs_llm_offload": Trial(ADAM),
    "fate_llm": Trial(ADAM, more=STEPS),
    "fedprox": Trial(ADAM),
    "scaffold": Trial(SGD),
    "fedsa": Trial(ADAM),
    "fedkseed": Trial((1e-3, 3e-3, 1e-2), more=("federation.method.perturbations=4",)),
    "spry": Trial(ADAM, more=(*STEPS, "federation.method.perturbations=8")),
    "spry_iteration": Trial(SGD, more=("federation.method.perturbations=8",)),
    "fedbiot": Trial(ADAM, more=(PUBLIC,)),
    "m2fedsa": Trial(ADAM),
}


def learn(tasks: list[str], only: list[str], out: Path) -> None:
    """Run all trials that have no result yet.

    Args:
        only: methods; empty: all. out: folder of the runs.
    """
    for task in tasks:
        public_rows(task)
        numbers = Numbers(f"learning-{task}")
        for method, trial in TRIALS.items():
            if only and method not in only:
                continue
            for lr in trial.lrs:
                _try(numbers, task, method, trial, lr=lr, folder=out.resolve() / task)


def _try(numbers: Numbers, task: str, method: str, trial: Trial, *, lr: float, folder: Path) -> None:
    """Run one trial unless its result is there."""
    name = f"{method}-{lr:g}"
    batches = (f"train.local_steps={ROWS[task] // trial.batch}", f"train.micro_batch={trial.batch}")
    arguments = [f"federation.method.name={method}", *COMMON, *batches, f"train.lr={lr:g}"]
    arguments += [more.format(task=task) for more in trial.more]
    if numbers.has(name, arguments):
        return
    records = launch(f"{task}_smol.yaml", folder, name, arguments)
    if records is None:
        return
    tokens = sum(record["tokens"] for record in records)
    values = {
        "method": method,
        "lr": lr,
        "loss_before": records[0]["val_loss"],
        "loss_after": records[-1]["val_loss"],
        "tokens": tokens,
        "seconds": round(sum(record["seconds"] for record in records[1:]), 1),
    }
    print(
        f"{task}: {name}: {values['loss_before']:.4f} -> {values['loss_after']:.4f}, {tokens} tokens, "
        f"{values['seconds']:.0f} s",
        flush=True,
    )
    numbers.put(name, arguments, **values)

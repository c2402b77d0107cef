"""Every method at three learning rates on two tasks, with a small model and few rows."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.baseline_runs import Numbers, evaluated, launch, public_rows, tokens_of

MAX_TOKENS = 20_000  # of all rows that clients train on in a run, prompts included
ROUNDS = 3
MACHINE = ("model.dtype=bf16", "engine.threads=1", "cluster.local_ranks=1", "routing.mode=plain")
# Few held-out rows, the same for all methods, before and after training only.
COMMON = (
    *MACHINE,
    "adapter.dropout=0",
    f"federation.rounds={ROUNDS}",
    f"federation.evaluate_every={ROUNDS}",
    "adapter.lora_rank=8",
    "adapter.alpha=16",
    "train.schedule=constant",
    "train.warmup_steps=0",
    "train.clip=0",
)
ROWS = {"gsm8k": 6, "dolly": 2}  # of a client in a round
HELD_OUT_ROWS = {"gsm8k": 12, "dolly": 4}  # of a client; Dolly has eight clients, GSM8K three


@dataclass(frozen=True)
class Trial:
    """How a method is trained.

    Attributes:
        lrs: learning rates. lrs_of: others for some tasks. more: further arguments.
        partial: whether its rounds evaluate something else than what is exported, which is then evaluated in
            the whole base.
    """

    lrs: tuple[float, float, float]
    lrs_of: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    partial: bool = False


ADAM = (1e-3, 3e-3, 1e-2)
SGD = (0.03, 0.1, 0.3)
FORWARD = (1e-3, 3e-3, 1e-2)
FORWARD_OF = {"dolly": (3e-4, 1e-3, 3e-3)}
# The variance of a forward gradient grows with the number of trained values.
FORWARD_SGD = (
    "adapter.lora_rank=1",
    "train.optimizer=sgd",
    "federation.server_optimizer=none",
    "federation.server_lr=auto",
    "federation.method.perturbations=2",
)
STEPS = ("federation.round_budget=steps",)
PUBLIC = "federation.public_rows=runs/baselines/public-{task}.jsonl"  # `public_rows` writes it
ALIGNED = (
    "train.optimizer=adamw",
    "federation.method.initial_alignment_steps=20",
    "federation.method.alignment_steps=5",
)
TRIALS: dict[str, Trial] = {
    "fedavg_lora": Trial(ADAM),
    "zero3_offload": Trial(ADAM),
    "fs_llm": Trial(SGD),
    "fs_llm_offload": Trial(ADAM),
    "fate_llm": Trial(ADAM, more=STEPS),
    "fedprox": Trial(ADAM),
    "scaffold": Trial(SGD),
    "fedsa": Trial(ADAM),
    "fedkseed": Trial(
        (3e-3, 0.01, 0.03), more=("federation.method.perturbations=2", "federation.method.epsilon=0.01")
    ),
    "spry": Trial(FORWARD, FORWARD_OF, more=(*STEPS, *FORWARD_SGD)),
    "spry_iteration": Trial(FORWARD, FORWARD_OF, more=FORWARD_SGD),
    "fedbiot": Trial(ADAM, more=(PUBLIC, *ALIGNED), partial=True),
    "m2fedsa": Trial(ADAM),
}


def learn(tasks: list[str], only: list[str], out: Path) -> bool:
    """Run all trials that have no result yet; return whether all have one afterwards.

    Args:
        only: methods; empty: all. out: folder of the runs.
    """
    complete = True
    for task in tasks:
        public_rows(task)
        numbers = Numbers(f"learning-{task}")
        for method in only or TRIALS:
            for lr in TRIALS[method].lrs_of.get(task, TRIALS[method].lrs):
                complete &= _try(numbers, task, method, lr=lr, folder=out.resolve() / task)
    return complete


def _rows(task: str) -> tuple[str, str, str]:
    """Return the settings of how many rows clients train on and hold out."""
    held_out = f"data.max_val_rows={HELD_OUT_ROWS[task]}"
    return (held_out, f"train.local_steps={ROWS[task]}", "train.micro_batch=1")


@functools.cache
def _tokens(task: str) -> int:
    """Return the tokens that a run trains on, which are those of the same rows in every method."""
    return tokens_of(f"{task}_smol.yaml", [*COMMON, *_rows(task)], range(ROUNDS))


def _try(numbers: Numbers, task: str, method: str, *, lr: float, folder: Path) -> bool:
    """Run one trial unless its result is there; return whether it is then."""
    name = f"{method}-{lr:g}"
    trial = TRIALS[method]
    config = f"{task}_smol.yaml"
    more = [argument.format(task=task) for argument in trial.more]
    settings = [f"federation.method.name={method}", *COMMON, *_rows(task), f"train.lr={lr:g}", *more]
    arguments = list({argument.split("=")[0]: argument for argument in settings}.values())
    if numbers.has(name, arguments):
        return True
    tokens = _tokens(task)
    assert tokens <= MAX_TOKENS, f"{task}: {tokens} tokens in a run are more than {MAX_TOKENS}"
    records = launch(config, folder, name, arguments)
    if records is None:
        return False
    values = {
        "method": method,
        "lr": lr,
        "loss_before": records[0]["val_loss"],
        "loss_after": records[-1]["val_loss"],
        "tokens": tokens,
        "answer_tokens": sum(record["tokens"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records[1:]), 1),
    }
    if trial.partial:
        values |= {"partial_before": values["loss_before"], "partial_after": values["loss_after"]}
        values |= {"loss_before": None, "loss_after": evaluated(folder / name)}
    before = "?" if values["loss_before"] is None else f"{values['loss_before']:.4f}"
    print(f"{task}: {name}: {before} -> {values['loss_after']:.4f}, {values['seconds']:.0f} s", flush=True)
    numbers.put(name, arguments, **values)
    return True

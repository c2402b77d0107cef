"""Causes that are switched in one engine on one machine: seconds of a step, and peak device memory."""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import WARM_UP, Rows, ds_config, join_ranks, run_ranks, write_model

LR = 1e-3
CLIENTS = 4
# name -> (model and rows, the engine's options). Tokens are few where loads count, so that an NVMe disk is
# the slower part, as it is for a model that is too large for everything else.
SIZES = {
    "loads": {"hidden": 768, "blocks": 8, "vocab": 4096, "tokens": 32, "micro": 8, "rows": 1},
    "clients": {"hidden": 768, "blocks": 8, "vocab": 4096, "tokens": 32, "micro": 2, "rows": 1},
    # Head and embedding are a sixth of the weights, as in models of 1.5B.
    "answers": {"hidden": 256, "blocks": 12, "vocab": 8192, "tokens": 128, "micro": 4, "rows": 2},
    "activations": {"hidden": 256, "blocks": 12, "vocab": 8192, "tokens": 128, "micro": 4, "rows": 2},
    "memory": {"hidden": 512, "blocks": 12, "vocab": 32_000, "tokens": 256, "micro": 2, "rows": 8},
}
QUICK = {"hidden": 128, "blocks": 4, "vocab": 2048, "tokens": 32, "micro": 4, "rows": 1}
# Everything on, as small as it goes: then one thing off, and all.
MEMORY = {
    "everything on": {},
    "base resident instead of streamed": {"tier": "resident"},
    "activations kept instead of computed again": {"keep": True},
    "logits of all answer tokens at once instead of in parts": {"logits_mib": 65_536},
    "logits of all tokens at once": {"all_logits": True},
    "all rows in one micro-batch": {"together": True},
    "all of these off": {"tier": "resident", "keep": True, "all_logits": True, "together": True},
}
LOGITS_MIB = 16  # of one part, where they are computed in parts
Pass = Callable[[], list[float]]  # makes a repetition; returns the losses of its steps


def sizes(name: str, quick: bool) -> argparse.Namespace:
    """Return the model and the rows of a cause."""
    return argparse.Namespace(**(QUICK if quick else SIZES[name]))


def measure(name: str, repeat: int, quick: bool) -> dict[str, Any]:
    """Return seconds and losses of all repetitions of a cause, by variant (`on`, `off`)."""
    args = sizes(name, quick)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args, args.blocks)
        found = run_ranks(_in_turn, 1, lambda rank, port: (name, port, folder, args, repeat))
    return found[0]


def peak(variant: str, quick: bool) -> dict[str, Any]:
    """Return the peak device bytes of a step of a variant of `MEMORY`, its loss, and the model's bytes."""
    args = sizes("memory", quick)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args, args.blocks)
        return run_ranks(_peak, 1, lambda rank, port: (variant, port, folder, args))[0]


def _in_turn(
    name: str, port: int, folder: str, args: argparse.Namespace, repeat: int, *, results: Any
) -> None:
    """Make the repetitions of both variants in turn, in the opposite order every other time."""
    from fedspeed.engine.world import leave_world

    join_ranks(port)
    passes, engines = VARIANTS[name](folder, args)
    seconds: dict[str, list[float]] = {variant: [] for variant in passes}
    losses: dict[str, list[float]] = {variant: [] for variant in passes}
    loaded: dict[str, int] = {}
    for number in range(WARM_UP + repeat):
        for variant in list(passes)[:: -1 if number % 2 else 1]:
            engines[variant].take_loaded()
            begin = time.perf_counter()
            losses[variant] += passes[variant]()
            if number >= WARM_UP:
                seconds[variant].append(time.perf_counter() - begin)
            loaded[variant] = engines[variant].take_loaded()
    base = engines["on"].base_bytes
    results.put((0, {"seconds": seconds, "losses": losses, "loaded": loaded, "base": base}))
    for engine in engines.values():
        engine.close()
    leave_world()


def build(folder: str, tier: str, *, clients: int = 1, **options: Any) -> Any:
    """Return an engine over the model of a folder, with its first state loaded in all client slots."""
    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock

    spec = EngineSpec(
        model=ModelConfig(base=folder, init="random", dtype="fp32"),
        adapter=AdapterConfig(),
        train=TrainConfig(),
        engine=EngineConfig(tier=tier, **options),
        deepspeed=ds_config(2, "fp32"),
    )
    swap = Path(folder) / "swap"
    context = EngineContext(client_sets=[(0,)], clock=StageClock(), nvme=swap, seed=0, clients=clients)
    engine = build_engine(spec, context)
    for slot in range(engine.client_slots):
        engine.load(engine.state(slot), slot=slot)
    return engine


def _one_step(engine: Any, step: Any) -> Pass:
    def run() -> list[float]:
        return [engine.train_step([step], LR)[0].loss / step.step_answer_tokens]

    return run


def _loads(folder: str, args: argparse.Namespace) -> tuple[dict[str, Pass], dict[str, Any]]:
    """Make one pass over the base for all micro-batches of a step; off: one for each of them, whose gradients
    add up to the same.
    """
    from fedspeed.data.batches import StepBatches

    engines = {variant: build(folder, "nvme") for variant in ("on", "off")}
    step = Rows(args, 0).step(args.micro, args.rows)

    def one_by_one() -> list[float]:
        parts = [StepBatches([batch], step.step_answer_tokens) for batch in step.micro]
        loss = sum(engines["off"].gradients([part])[0].loss for part in parts)
        engines["off"].step(LR)
        return [loss / step.step_answer_tokens]

    return {"on": _one_step(engines["on"], step), "off": one_by_one}, engines


def _clients(folder: str, args: argparse.Namespace) -> tuple[dict[str, Pass], dict[str, Any]]:
    """Let four clients take two steps together; off: one client after the other, as with a client's turn."""
    engines = {
        "on": build(folder, "nvme", clients=CLIENTS, client_slots=CLIENTS),
        "off": build(folder, "nvme", clients=CLIENTS, client_slots=1),
    }
    steps = [Rows(args, client).step(args.micro, args.rows) for client in range(CLIENTS)]
    first = engines["on"].state(0)

    def turn(engine: Any, clients: Sequence[int]) -> dict[int, list[float]]:
        for slot in range(len(clients)):
            engine.load(first, slot=slot)
        losses: dict[int, list[float]] = {client: [] for client in clients}
        for _ in range(2):
            work = [steps[client] for client in clients]
            for client, sums in zip(clients, engine.train_step(work, LR), strict=True):
                losses[client].append(sums.loss / steps[client].step_answer_tokens)
        return losses

    def together() -> list[float]:
        return [loss for found in turn(engines["on"], range(CLIENTS)).values() for loss in found]

    def one_by_one() -> list[float]:
        return [loss for client in range(CLIENTS) for loss in turn(engines["off"], [client])[client]]

    return {"on": together, "off": one_by_one}, engines


def _answers(folder: str, args: argparse.Namespace) -> tuple[dict[str, Pass], dict[str, Any]]:
    """Compute the logits of answer tokens; off: of all tokens, of which the others count for nothing."""
    engines = {variant: build(folder, "resident") for variant in ("on", "off")}
    compute_all_logits(engines["off"], in_parts=True)
    step = Rows(args, 0).step(args.micro, args.rows)
    return {variant: _one_step(engine, step) for variant, engine in engines.items()}, engines


def _activations(folder: str, args: argparse.Namespace) -> tuple[dict[str, Pass], dict[str, Any]]:
    """Keep the activations that memory has room for; off: compute each block again."""
    engines = {"on": build(folder, "resident"), "off": build(folder, "resident", activation_gib=0.0)}
    step = Rows(args, 0).step(args.micro, args.rows)
    return {variant: _one_step(engine, step) for variant, engine in engines.items()}, engines


VARIANTS = {"loads": _loads, "clients": _clients, "answers": _answers, "activations": _activations}


def compute_all_logits(engine: Any, *, in_parts: bool) -> None:
    """Switch off that an engine computes the logits of answer tokens only.

    Args:
        in_parts: whether those of all tokens are computed in parts of bounded size, as those of answers are.
    """
    import torch
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    from fedspeed.data.encode import IGNORED
    from fedspeed.engine.compute.micro_batches import DeviceScore

    compute = engine._executor.stage.compute

    def head(hidden: Any, task: Any, differentiate: bool = True) -> Any:
        targets = torch.full(task.batch.labels.shape, IGNORED)
        targets[:, :-1] = torch.from_numpy(task.batch.labels[:, 1:])
        targets = targets.flatten()
        with torch.enable_grad():
            x = hidden.requires_grad_()
            normed = compute._parts.norm(x).flatten(0, 1)
        outputs = normed.detach()
        downward = torch.empty_like(outputs)
        loss = torch.zeros((), dtype=torch.float64)
        for part in compute.pieces(outputs) if in_parts else [slice(None)]:
            piece = outputs[part].requires_grad_()
            with torch.enable_grad():
                lost = chunked_cross_entropy(
                    compute.logits(piece), targets[part], ignore_index=IGNORED, reduction="sum"
                )
                (downward[part],) = torch.autograd.grad(lost * task.scale, piece)
            loss += lost.detach()
        return DeviceScore(loss, None), torch.autograd.grad(normed, x, downward)[0]

    compute.head = head


def _peak(variant: str, port: int, folder: str, args: argparse.Namespace, *, results: Any) -> None:
    """Take one step, whose tensors are counted."""
    from fedspeed.engine.world import leave_world

    join_ranks(port)
    off = MEMORY[variant]
    engine = build(
        folder,
        off.get("tier", "ram"),
        activation_gib="auto" if off.get("keep") else 0.0,
        logits_mib=off.get("logits_mib", LOGITS_MIB),
    )
    if off.get("all_logits"):
        compute_all_logits(engine, in_parts=False)
    rows = args.micro * args.rows
    step = Rows(args, 0).step(*((1, rows) if off.get("together") else (args.micro, args.rows)))
    losses = [engine.train_step([step], LR)[0].loss / step.step_answer_tokens for _ in range(2)]
    results.put((0, {"peak": engine.device_bytes, "losses": losses, "base": engine.base_bytes}))
    engine.close()
    leave_world()

"""Weights, optimizer state, activations and bytes on the wire of every method, measured on a real model and
compared with `baseline_formulas`.

Sizes are measured in an engine that is built and takes steps in a process of its own, one for each role; the
peak of its memory and the bytes on the wire are those of a run of `launch.py` with three clients.
"""

from pathlib import Path

from benchmarks.baseline_formulas import FORMULAS, Model, Round
from benchmarks.baseline_runs import ROOT, Numbers, launch
from benchmarks.common import join_ranks, run_ranks

CLIENTS = 3
STEPS = 2
MACHINE = (
    "model.dtype=bf16",
    "engine.threads=1",
    "routing.mode=plain",
    "adapter.lora_rank=8",
    "data.max_val_rows=2",
    "federation.rounds=2",
    "federation.evaluate_every=2",
    f"train.local_steps={STEPS}",
    "train.micro_batch=2",
)


def measure_costs(only: list[str], out: Path) -> None:
    """Measure all methods that have no numbers yet.

    Args:
        only: methods; empty: all. out: folder of the runs.
    """
    numbers = Numbers("costs")
    for method in FORMULAS:
        if only and method not in only:
            continue
        arguments = [f"federation.method.name={method}", *MACHINE, *MORE.get(method, ())]
        if not numbers.has(method, arguments):
            _measure(numbers, method, arguments, out.resolve() / "costs")


# Further arguments by method.
MORE: dict[str, tuple[str, ...]] = {}


def _measure(numbers: Numbers, method: str, arguments: list[str], folder: Path) -> None:
    roles = FORMULAS[method]
    records = launch("gsm8k_smol.yaml", folder, method, [*arguments, f"cluster.local_ranks={CLIENTS}"])
    if records is None:
        return
    last = records[-1]
    model = Model.read(ROOT / "runs" / "smollm2-135m")
    round_ = Round(participants=CLIENTS + (len(roles) - 1), steps=STEPS, tokens=0)
    values: dict[str, object] = {
        "sent": [client["bytes_sent"] for client in last["per_client"]],
        "sent_in_all": last["bytes_sent"],
        "peak": last["device_bytes"],
    }
    for role, formula in roles.items():
        sizes = run_ranks(_sizes, 1, lambda rank, port: (rank, port, arguments, role))[0]
        expected = formula(model, round_)
        values[role] = sizes | {"formula": vars(expected)}
        print(f"{method}: {role}: {sizes}, by formula {vars(expected)}", flush=True)
    print(f"{method}: sent {values['sent']}, peak {values['peak']}", flush=True)
    numbers.put(method, arguments, **values)


def _sizes(rank: int, port: int, arguments: list[str], role: str, *, results) -> None:
    """Put the bytes of a role's weights, working copies and optimizer state, after a step."""
    from fedspeed.config.deepspeed import merge
    from fedspeed.config.load import load
    from fedspeed.engine.build import EngineContext, build_engine
    from fedspeed.engine.world import leave_world
    from fedspeed.monitor.clock import StageClock
    from fedspeed.session.engine_spec import engine_spec

    loaded = load(ROOT / "ds_configs" / "gsm8k_smol.yaml", arguments)
    spec = engine_spec(loaded.config, merge(loaded.config.deepspeed, loaded.config, loaded.folder), role)
    join_ranks(port)
    context = EngineContext(
        client_sets=[(0,)], clock=StageClock(), nvme=ROOT / "runs" / "baselines" / "swap", seed=0
    )
    engine = build_engine(spec, context)
    state = engine.state()
    engine.load(state)
    engine.add_to_gradients(0, {name: value.numpy() for name, value in state.items()}, 1e-3)
    engine.step(1e-3)
    sizes = {
        "weights": engine.base_bytes,
        "trainable": sum(value.numel() for value in state.values()),
        "optimizer": sum(map(_optimizer_bytes, engine._states)),
    }
    results.put((rank, sizes))
    engine.close()
    leave_world()


def _optimizer_bytes(state) -> int:
    """Return the bytes of a client slot's fp32 masters and moments."""
    import torch

    optimizer = state.ds_engine.optimizer
    tensors = list(getattr(optimizer, "fp32_partitioned_groups_flat", ()))  # ZeRO-3's masters
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    tensors += [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for moments in optimizer.state.values():
        tensors += [value for value in moments.values() if isinstance(value, torch.Tensor) and value.dim()]
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())

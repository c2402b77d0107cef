"""Weights, optimizer state, activations and bytes on the wire of every method, measured on a real model and
compared with `baseline_formulas`.

Sizes are measured in an engine that is built and takes steps in a process of its own, one for each role; the
peak of its memory and the bytes on the wire are those of a run of `launch.py` with three clients.
"""

from pathlib import Path

from benchmarks.baseline_formulas import FORMULAS, Model, Round
from benchmarks.baseline_runs import ROOT, Numbers, launch, public_rows, tokens_of
from benchmarks.common import join_ranks, run_ranks

CONFIG = "gsm8k_smol.yaml"
CLIENTS = 3
STEPS = 2
MACHINE = (
    "model.dtype=bf16",
    "engine.threads=1",
    "routing.mode=plain",
    "adapter.lora_rank=8",
    "data.max_val_rows=2",
    "federation.rounds=3",
    "federation.evaluate_every=3",
    f"train.local_steps={STEPS}",
    "train.micro_batch=2",
)


SGD = ("train.optimizer=sgd", "train.clip=0")
# Further arguments by method.
MORE: dict[str, tuple[str, ...]] = {
    "fate_llm": ("federation.round_budget=steps",),
    "fate_llm compact": ("federation.round_budget=steps", "federation.method.secure_sum=compact"),
    "spry": ("federation.round_budget=steps",),
    # Its own SGD at its own rate changes A by less than a rounding, and zeros are not sent.
    "fedbiot": ("train.optimizer=adamw", "federation.public_rows=runs/baselines/public-gsm8k.jsonl"),
}


def measure_costs(only: list[str], out: Path) -> bool:
    """Measure all methods that have no numbers yet; return whether all have some afterwards.

    Args:
        only: methods; empty: all. out: folder of the runs.
    """
    public_rows("gsm8k")
    numbers = Numbers("costs")
    complete = True
    for name in only or FORMULAS:
        arguments = [f"federation.method.name={name.split()[0]}", *MACHINE, *MORE.get(name, ())]
        if not numbers.has(name, arguments):
            complete &= _measure(numbers, name, arguments, out.resolve() / "costs")
    return complete


def _measure(numbers: Numbers, name: str, arguments: list[str], folder: Path) -> bool:
    """Measure one method, and write its numbers beside those of its formulas; return whether it ran."""
    roles = FORMULAS[name]
    places = [f"cluster.local_ranks={CLIENTS}"]
    records = launch(CONFIG, folder, name.replace(" ", "-"), [*arguments, *places])
    if records is None:
        return False
    model = Model.read(ROOT / "runs" / "smollm2-135m")
    round_ = Round(
        CLIENTS + len(roles) - 1,
        clients=CLIENTS,
        steps=STEPS,
        tokens=tokens_of(CONFIG, arguments, range(1, 2)) / CLIENTS,
    )
    record = records[2]  # of a round that is not evaluated
    sent = [client["bytes_sent"] for client in record["per_client"]]
    values: dict[str, object] = {"peak": record["device_bytes"]}
    for role, formula in roles.items():
        sizes = run_ranks(_sizes, 1, lambda rank, port: (rank, port, arguments, role))[0]
        sizes["sent"] = sum(sent) / CLIENTS if role == "client" else record["bytes_sent"] - sum(sent)
        expected = vars(formula(model, round_))
        values[role] = {key: [sizes[key], expected[key]] for key in expected} | {"trained": sizes["trained"]}
        print(f"{name}: {role}: {values[role]}", flush=True)
    numbers.put(name, arguments, **values)
    return True


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
        "trained": sum(value.numel() for value in state.values()),
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

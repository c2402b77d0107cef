"""Build engines for the tests of this folder, in a rank whose world has one cluster, on tiny models."""

import contextlib
import sys
from dataclasses import replace
from importlib.util import find_spec

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.schedule.limits import QUANTISED
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.tiny import NoClock

ZERO = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero1-cpu": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "zero2-cpu": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3-cpu-optimizer": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "zero3-cpu-base": {"stage": 3, "offload_param": {"device": "cpu"}},
    "zero3-cpu": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "zero3-nvme-optimizer": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "auto"}},
    "zero3-nvme-base": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "auto"}},
    "zero3-nvme": {
        "stage": 3,
        "offload_param": {"device": "nvme", "nvme_path": "auto"},
        "offload_optimizer": {"device": "nvme", "nvme_path": "auto"},
    },
}
TIERS = (
    "resident",
    "int8",
    "nf4",
    "ram",
    "nvme",
    "client",
    "cluster",
)  # tiers whose base is in a store and which compute layer by layer

OPTIONAL = ROOT / ".venv" / "optional"  # what launchers/test.sh installs apart from the rest


def find_optional() -> bool:
    """Make the optional packages importable in this process; whether they are there."""
    if str(OPTIONAL) not in sys.path:
        sys.path.append(str(OPTIONAL))
    return find_spec("bitsandbytes") is not None


def options_of(kind: str, options: EngineConfig | None = None) -> EngineConfig:
    return replace(options or EngineConfig(), tier=kind if kind in TIERS else "stock")


def ds_config(kind: str, dtype: str, micro: int = 4, **extra) -> dict:
    zero = {"reduce_bucket_size": "auto", **ZERO.get(kind, {"stage": 2}), "overlap_comm": False}
    if zero["stage"] == 3:
        zero.update(
            dict.fromkeys(
                (
                    "stage3_prefetch_bucket_size",
                    "stage3_max_live_parameters",
                    "stage3_max_reuse_distance",
                    "stage3_param_persistence_threshold",
                ),
                "auto",
            )
        )
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 8},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **extra,
    }


def compute_in(dtype: str) -> None:
    """Let this process compute in a type on any CPU, as torch does. DeepSpeed accepts fp16 only on CPUs with
    AVX512-FP16, for speed.
    """
    if dtype == "fp16":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True


def in_world(rank, function, *args):
    """Call a function in a rank's world, which it joins once for several engines (join=False)."""
    import torch

    from fedspeed.engine.world import join_world, leave_world, quiet

    torch.set_num_threads(1)
    quiet()
    join_world(LIMIT_S)
    try:
        return function(rank, *args)
    finally:
        leave_world()


@contextlib.contextmanager
def engine(
    base: str,
    kind: str = "zero0",
    dtype: str = "fp32",
    clients=((0,),),
    nvme="unused",
    *,
    adapter: AdapterConfig | None = None,
    train: TrainConfig | None = None,
    options: EngineConfig | None = None,
    seed: int = 0,
    join: bool = True,
    client_slots: int = 1,
    blocks: tuple[int, ...] | None = None,
    part: str = "whole",
    **extra,
):
    """Join this rank's world, build its engine and leave the world in the end."""
    import torch

    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.world import join_world, leave_world, quiet

    torch.set_num_threads(1)
    quiet()
    if kind in QUANTISED:
        find_optional()
    compute_in(dtype)
    if join:
        join_world(LIMIT_S)
    try:
        import os
        from pathlib import Path

        spec = EngineSpec(
            model=ModelConfig(base=base, dtype=dtype),
            adapter=adapter or AdapterConfig(targets="all-linear"),
            train=train or TrainConfig(),
            engine=options_of(kind, options),
            deepspeed=ds_config(kind, dtype, **extra),
            blocks=blocks,
            part=part,
        )
        yield build_engine(
            spec,
            EngineContext(
                client_sets=list(clients),
                clock=NoClock(),
                nvme=Path(nvme) / f"rank{os.environ['RANK']}",
                seed=seed,
                clients=client_slots,
            ),
        )
    finally:
        if join:
            leave_world()

"""How this process computes beyond its numeric type: the sums of matrix products, and whether each operation
repeats itself bit for bit.
"""

import os
import socket

import torch

from fedspeed.engine.device_types import own_index
from fedspeed.errors import ConfigError

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # the values of it under which cuBLAS gives the same bits each time
_TF32_FROM = (8, 0)  # CUDA compute capability: Ampere


def check_arithmetic(matmul: str, deterministic: bool, local_rank: int = 0) -> None:
    """Whether the device of a rank, the installed torch and the environment let this process compute as
    asked.

    Args:
        matmul: value of engine.matmul.
        deterministic: value of engine.deterministic.
        local_rank: as the launcher numbers the ranks of a machine.

    Raises:
        ConfigError: they do not. A switch that changes nothing would be taken for one that does.
    """
    workspace = os.environ.get(CUBLAS_WORKSPACE, REPEATABLE[0])
    if deterministic and workspace not in REPEATABLE:
        raise ConfigError(
            f"engine.deterministic=true, but {CUBLAS_WORKSPACE}={workspace} lets cuBLAS give "
            f"other bits each time; unset it, or "
            f"set it to {' or '.join(REPEATABLE)}"
        )
    if matmul == "default":
        return
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator().device_name()
    if accelerator != "cuda":
        raise ConfigError(
            f"engine.matmul={matmul} is arithmetic of NVIDIA cards, but ranks on "
            f"{socket.gethostname()} compute on the "
            f"{accelerator}; set engine.matmul=default"
        )
    if matmul == "fp16_accumulation" and not _has_fp16_accumulation():
        raise ConfigError(
            f"engine.matmul=fp16_accumulation: torch {torch.__version__} has no such switch; "
            f"install 2.7 or newer, or set "
            "engine.matmul=default"
        )
    index = own_index(local_rank)
    if matmul == "tf32" and torch.cuda.get_device_capability(index) < _TF32_FROM:
        raise ConfigError(
            f"engine.matmul=tf32: cuda:{index} of {socket.gethostname()} is older than Ampere "
            f"and has no such products; set "
            "engine.matmul=default"
        )


def set_arithmetic(matmul: str, deterministic: bool) -> None:
    """Let this process compute as engine.matmul and engine.deterministic say, which `check_arithmetic` has
    passed.

    To be called before anything is computed: cuBLAS reads its setting once. What they do to losses is told in
    docs/gpu.md.
    """
    if _has_fp16_accumulation():
        torch.backends.cuda.matmul.allow_fp16_accumulation = matmul == "fp16_accumulation"
    torch.backends.cuda.matmul.allow_tf32 = matmul == "tf32"
    if deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, REPEATABLE[0])
    torch.use_deterministic_algorithms(deterministic)


def _has_fp16_accumulation() -> bool:
    return hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation")

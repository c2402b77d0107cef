"""How this process computes, apart from its numeric type: the precision of sums in matrix products, and
whether operations are deterministic.
"""

import os
import socket

import torch

from fedspeed.engine.device_types import device_index_of_rank
from fedspeed.errors import ConfigError

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC = (":4096:8", ":16:8")  # values of this variable under which cuBLAS is deterministic
_TF32_FROM = (8, 0)  # CUDA compute capability: Ampere


def check_arithmetic(matmul: str, deterministic: bool, local_rank: int = 0) -> None:
    """Check that the device of a rank, the installed torch and the environment support the settings.

    Args:
        matmul: value of engine.matmul.
        deterministic: value of engine.deterministic.
        local_rank: as the launcher numbers the ranks of a machine.

    Raises:
        ConfigError: they do not. torch itself would ignore such a setting without a message.
    """
    workspace = os.environ.get(CUBLAS_WORKSPACE, DETERMINISTIC[0])
    if deterministic and workspace not in DETERMINISTIC:
        raise ConfigError(
            f"engine.deterministic=true, but {CUBLAS_WORKSPACE}={workspace} lets cuBLAS give "
            f"other bits each time; unset it, or set it to {' or '.join(DETERMINISTIC)}"
        )
    if matmul == "default":
        return
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator().device_name()
    if accelerator != "cuda":
        raise ConfigError(
            f"engine.matmul={matmul} is arithmetic of NVIDIA cards, but ranks on "
            f"{socket.gethostname()} compute on the {accelerator}; set engine.matmul=default"
        )
    if matmul == "fp16_accumulation" and not _has_fp16_accumulation():
        raise ConfigError(
            f"engine.matmul=fp16_accumulation: torch {torch.__version__} has no such switch; "
            "install 2.7 or newer, or set engine.matmul=default"
        )
    index = device_index_of_rank(local_rank)
    if matmul == "tf32" and torch.cuda.get_device_capability(index) < _TF32_FROM:
        raise ConfigError(
            f"engine.matmul=tf32: cuda:{index} of {socket.gethostname()} is older than Ampere "
            "and has no such products; set engine.matmul=default"
        )


def set_arithmetic(matmul: str, deterministic: bool) -> None:
    """Apply engine.matmul and engine.deterministic to this process, after `check_arithmetic` has passed.

    Call this before the first computation: cuBLAS reads its variable once. docs/gpu.md shows the effect on
    losses.
    """
    if _has_fp16_accumulation():
        torch.backends.cuda.matmul.allow_fp16_accumulation = matmul == "fp16_accumulation"
    torch.backends.cuda.matmul.allow_tf32 = matmul == "tf32"
    if deterministic:
        os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC[0])
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)


def _has_fp16_accumulation() -> bool:
    return hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation")

"""Joining and leaving this cluster's torch world. The environment says which one (see cluster/rendezvous)."""

import logging
import os
from datetime import timedelta


def quiet(level: int = logging.ERROR) -> None:
    """DeepSpeed, transformers and PEFT tell every rank's life story; a user reads our progress line instead."""
    import warnings

    import transformers
    from deepspeed.utils import logger

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch")
    logger.setLevel(level)
    transformers.logging.set_verbosity(level)
    transformers.logging.disable_progress_bar()


def join_world(deadline_s: float) -> None:
    """Initialise torch.distributed over this cluster's ranks only; collectives fail after `deadline_s` instead of hanging."""
    import deepspeed
    import deepspeed.ops as ops
    from deepspeed.accelerator import get_accelerator

    # This op only serves inference, and building it would ask every user for a compiler.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before anything is put on "the current device": all ranks of a host would meet on its first one.
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timedelta(seconds=deadline_s), verbose=False)


def lost_connection(error: Exception) -> bool:
    """Whether a collective failed because a peer is gone; torch has no kind of its own for that on gloo."""
    signs = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "gloo", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def leave_world() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()

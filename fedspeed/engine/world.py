"""Joining and leaving this cluster's torch world. The environment says which one (see cluster/rendezvous)."""

import logging
import os
from datetime import timedelta

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


def quiet(level: int = logging.ERROR) -> None:
    """DeepSpeed, transformers and PEFT tell every rank's life story; a user reads our progress line instead."""
    import warnings

    import transformers
    from deepspeed.utils import logger

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch")
    logger.setLevel(level)
    transformers.logging.set_verbosity(level)
    transformers.logging.disable_progress_bar()


def import_deepspeed() -> None:
    """Import what DeepSpeed imports for any optimizer, without torch's compiler.

    It looks whether the optimizer is its Muon, whose decorators would have the compiler loaded: 550 modules, over a second of every rank.
    """
    as_set = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        if as_set is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = as_set


def join_world(deadline_s: float) -> None:
    """Initialise torch.distributed over this cluster's ranks only; collectives fail after `deadline_s` instead of hanging."""
    import deepspeed
    import deepspeed.ops as ops
    from deepspeed.accelerator import get_accelerator

    import_deepspeed()
    # DeepSpeed would make this table when it is first read, by compiling a probe, in every rank. It looks up one operator in it, which only serves
    # inference and would have to be built.
    ops.__compatible_ops__ = {}
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

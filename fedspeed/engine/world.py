"""Joining and leaving this cluster's torch world. The environment says which one (see cluster/rendezvous)."""

import logging
import os
from datetime import timedelta

from fedspeed.engine.device_types import own_index

_NO_COMPILER = "TORCHDYNAMO_DISABLE"
_OPEN_MPI_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"


def quiet(level: int = logging.ERROR) -> None:
    """DeepSpeed, transformers and PEFT tell every rank's life story; a user reads our progress line
    instead.
    """
    import warnings

    import transformers
    from deepspeed.utils import logger

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch")
    logger.setLevel(level)
    transformers.logging.set_verbosity(level)
    transformers.logging.disable_progress_bar()


def import_deepspeed() -> None:
    """Import what DeepSpeed imports for any optimizer, without torch's compiler.

    It looks whether the optimizer is its Muon, whose decorators would have the compiler loaded: 550 modules,
    over a second of every rank.
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
    """Initialise torch.distributed over this cluster's ranks only; collectives fail after `deadline_s`
    instead of hanging.
    """
    import deepspeed
    import deepspeed.ops as ops
    from deepspeed.accelerator import get_accelerator

    import_deepspeed()
    # DeepSpeed would make this table when it is first read, by compiling a probe, in every rank. It looks up
    # one operator in it, which only serves inference and would have to be built.
    ops.__compatible_ops__ = {}
    if get_accelerator().device_name() != "cpu":
        take_device()
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timedelta(seconds=deadline_s), verbose=False)


def take_device() -> None:
    """Make this rank's device the current one, before anything is put there, and let DeepSpeed take the same.

    DeepSpeed reads LOCAL_RANK as the index of the device in many places, and holds it against Open MPI's. A
    launcher that shows each rank one device numbers them all 0, whatever the rank's number is.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    index = own_index(int(os.environ["LOCAL_RANK"]))
    os.environ["LOCAL_RANK"] = str(index)
    if _OPEN_MPI_RANK in os.environ:
        os.environ[_OPEN_MPI_RANK] = str(index)
    accelerator.set_device(index)
    if accelerator.device_name() == "cuda":
        _ask_torch_for_memory()


def _ask_torch_for_memory() -> None:
    """Keep DeepSpeed from asking NVIDIA's library for free memory where CUDA_VISIBLE_DEVICES names devices
    otherwise than by whole numbers: it takes each name for one, and ZeRO-1 and 2 would end. Without that
    library it asks torch.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or all(name.strip().isdecimal() for name in named.split(",")):
        return
    from deepspeed.accelerator import cuda_accelerator

    cuda_accelerator.pynvml = None


def lost_connection(error: Exception) -> bool:
    """Whether a collective failed because a peer is gone; torch has no kind of its own for that on gloo."""
    signs = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "gloo", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def leave_world() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()

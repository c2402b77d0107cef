"""Join and leave the torch world of this cluster. Environment variables say which one (see
cluster/torch_world).
"""

import logging
import os
from datetime import timedelta

from fedspeed.engine.device_types import device_index_of_rank
from fedspeed.net.interfaces import GLOO_INTERFACE, LOOPBACK, NCCL_INTERFACE, interface_of

_OPEN_MPI_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"


def quiet(level: int = logging.ERROR) -> None:
    """Silence the progress messages that DeepSpeed, transformers and PEFT write on every rank."""
    import warnings

    import transformers
    from deepspeed.utils import logger

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch")
    logger.setLevel(level)
    transformers.logging.set_verbosity(level)
    transformers.logging.disable_progress_bar()


def import_deepspeed() -> None:
    """Import what DeepSpeed imports for any optimizer, without torch's compiler.

    DeepSpeed checks whether the optimizer is its Muon. The decorators of Muon import the compiler: 550
    modules, over a second on every rank.
    """
    from deepspeed.runtime import compiler

    as_it_is = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = as_it_is


def join_world(deadline_s: float) -> None:
    """Initialise torch.distributed over this cluster's ranks only. Collectives fail after `deadline_s`
    seconds instead of waiting forever.

    The store of a world of one rank is in its memory. What its backend listens on is loopback: gloo opens a
    port even there, as NCCL does.
    """
    import deepspeed
    import deepspeed.ops as ops
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    import_deepspeed()
    # DeepSpeed would fill this table by compiling a test program on every rank. It looks up only one
    # operator, which is for inference and would have to be built.
    ops.__compatible_ops__ = {}
    if get_accelerator().device_name() != "cpu":
        take_device()
    timeout = timedelta(seconds=deadline_s)
    if os.environ["WORLD_SIZE"] == "1":
        loopback = interface_of(LOOPBACK)
        os.environ |= {GLOO_INTERFACE: loopback, NCCL_INTERFACE: f"={loopback}"}
        backend = get_accelerator().communication_backend_name()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)


def take_device() -> None:
    """Make this rank's device the current one before any tensor is allocated, also for DeepSpeed.

    DeepSpeed uses LOCAL_RANK as the device index in many places, and compares it with Open MPI's variable.
    Under a launcher that makes one device visible to each rank that index is 0, whatever the local rank is.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    index = device_index_of_rank(int(os.environ["LOCAL_RANK"]))
    os.environ["LOCAL_RANK"] = str(index)
    if _OPEN_MPI_RANK in os.environ:
        os.environ[_OPEN_MPI_RANK] = str(index)
    accelerator.set_device(index)
    if accelerator.device_name() == "cuda":
        _ask_torch_for_memory()


def _ask_torch_for_memory() -> None:
    """Let DeepSpeed read the free memory from torch where CUDA_VISIBLE_DEVICES names devices by UUID.
    DeepSpeed converts each name to an integer for NVIDIA's library, and ZeRO-1 and 2 would fail.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or all(name.strip().isdecimal() for name in named.split(",")):
        return
    from deepspeed.accelerator import cuda_accelerator

    cuda_accelerator.pynvml = None


def lost_connection(error: Exception) -> bool:
    """Tell whether a collective failed because another rank is gone. torch has no exception type for that on
    gloo, so the message decides.
    """
    signs = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "gloo", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def leave_world() -> None:
    """Destroy this process's torch world, if it has joined one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()

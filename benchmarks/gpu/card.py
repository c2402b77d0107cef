"""The card of a phase: its name, a cap on its memory, and its peak memory."""

import gc
import os
import time

from benchmarks.common import join_ranks

GIB = 2**30


def about(dry: bool) -> dict:
    """Return the facts that head all results: card, torch version, date and cores."""
    import torch

    name = "none (dry run on the CPU)" if dry else torch.cuda.get_device_name()
    return {
        "card": name,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cores": os.cpu_count(),
    }


def join(dry: bool) -> None:
    """Become the only rank of a torch world.

    Raises:
        RuntimeError: DeepSpeed does not compute on a card, and this is no dry run.
    """
    from fedspeed.net.ports import free_port

    join_ranks(free_port())
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().device_name()
    wanted = "cpu" if dry else "cuda"
    if found != wanted:
        raise RuntimeError(
            f"DeepSpeed computes on {found} and not on {wanted}; unset DS_ACCELERATOR (it is "
            f"{os.environ.get('DS_ACCELERATOR')!r}), or add --dry for a run without a card"
        )
    if not dry:
        draw_there()


def draw_there() -> None:
    """Draw random weights on the card, since a CPU takes minutes for a model of 7 B parameters."""
    from fedspeed.models import loading

    loading.draw_device = "cuda"


def cap(gib: float, dry: bool) -> None:
    """Limit PyTorch to `gib` GiB of the card's memory; 0: no limit."""
    if dry:
        return
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total) if gib else 1.0)


def synchronise(dry: bool) -> None:
    """Wait until the card has finished all work."""
    if not dry:
        import torch

        torch.cuda.synchronize()


def forget_peaks(dry: bool) -> None:
    """Reset the peaks of memory."""
    if not dry:
        import torch

        torch.cuda.reset_peak_memory_stats()


def peaks(dry: bool) -> dict:
    """Return the peak GiB of tensors and of PyTorch's allocator; empty without a card."""
    if dry:
        return {}
    import torch

    stats = torch.cuda.memory_stats()
    return {
        "peak GiB": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved GiB": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "retries": stats.get("num_alloc_retries", 0),
    }


def tidy(dry: bool) -> None:
    """Free the memory of closed engines."""
    gc.collect()
    if not dry:
        import torch

        torch.cuda.empty_cache()

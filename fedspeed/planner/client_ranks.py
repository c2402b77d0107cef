"""The LoRA rank that each client's devices have memory for (`adapter.rank_by_client: auto`). Pure.

It depends on the configuration and on stated facts of the hosts only, never on what a rank measures at its
start, so that all ranks and every later start of the run come to the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedspeed.planner.fitting import fits_everywhere, with_activations, worst_shortage
from fedspeed.planner.plan import RankProfile, Setting, Task


def halved(lora_rank: int) -> Iterator[int]:
    """Yield lora_rank, lora_rank/2, lora_rank/4 ... 1, rounded down."""
    while lora_rank:
        yield lora_rank
        lora_rank //= 2


def of_client_rank(task: Task, lora_rank: int) -> Task:
    """Return a task as a rank with smaller adapters has it. The directions of the common adapter that it does
    not train are part of its folded adapter.
    """
    left_out = task.lora_rank - lora_rank
    return replace(task, lora_rank=lora_rank, folded_rank=task.folded_rank + left_out)


def rank_that_fits(
    task: Task,
    setting: Setting,
    profiles: Sequence[RankProfile],
    *,
    block_inputs: str,
    activation_gib: float | str,
) -> int | None:
    """Return the largest of the task's LoRA rank, its half, quarter ... 1 with which a setting fits on all
    ranks of a client; None if it fits with none of them.

    Args:
        setting: as configured, without kept activations. profiles: of the client's ranks.
        block_inputs, activation_gib: as in `with_activations`.
    """
    for lora_rank in halved(task.lora_rank):
        smaller = of_client_rank(task, lora_rank)
        completed = with_activations(
            smaller, setting, profiles, block_inputs=block_inputs, activation_gib=activation_gib
        )
        if fits_everywhere(smaller, completed, profiles):
            return lora_rank
    return None


def shortage_of_smallest(task: Task, setting: Setting, profiles: Sequence[RankProfile]) -> str:
    """Describe, with numbers, what a setting lacks on a client's worst rank even with LoRA rank 1."""
    return worst_shortage(of_client_rank(task, 1), setting, profiles)[1]

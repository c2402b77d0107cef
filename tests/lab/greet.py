"""A program for tests of the virtual cluster: every rank makes one all-reduce and prints its host."""

import os
import socket

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

# Needed for inference only, and would be compiled at initialisation.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    # One write, so that lines of different ranks cannot mix.
    os.write(
        1,
        (
            f"greet rank={dist.get_rank()} size={dist.get_world_size()} host={socket.gethostname()} "
            f"sum={total.item():.0f} "
            f"mark={os.environ.get('LAB_MARK')}\n"
        ).encode(),
    )
    dist.destroy_process_group()  # its threads may abort the process when the interpreter ends under them


main()

"""What the tests start on a virtual cluster: every rank says where it is and takes part in one all-reduce."""

import os
import socket

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

# Compiled at initialisation otherwise, and used for inference only.
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

"""What one client trains, with PEFT and accelerate's DeepSpeed plugin: ZeRO-3, with parameters and optimizer
offloaded to the CPU (which is also where it computes here).

    python -m torch.distributed.run ... -m benchmarks.compare.outside.apps.accelerate_app FOLDER THREADS

Every process takes its share of each batch. As under FedSpeed's stock tier, torch's AdamW updates the
offloaded state: DeepSpeed's own would need a compiler.
"""

import sys
from pathlib import Path

from benchmarks.compare.outside.task import ALONE, BATCH, ROUNDS, STEPS, print_round
from benchmarks.compare.outside.trainer import Trainer

CLIENT = 0
OFFLOAD = {"device": "cpu", "pin_memory": False}


def accelerator(processes: int):
    """Return accelerate's door to DeepSpeed; gloo is named because there is no GPU to choose a backend by."""
    import deepspeed.ops
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    # DeepSpeed would compile an operator for inference when it starts, which no training step calls.
    # FedSpeed leaves it out too.
    deepspeed.ops.__compatible_ops__ = {}
    config = {
        "train_micro_batch_size_per_gpu": BATCH // processes,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "offload_param": OFFLOAD,
            "offload_optimizer": OFFLOAD,
        },
    }
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def held_out(own: Trainer, engine, ranks: int, rank: int) -> tuple[float, int]:
    """Return (sum of the loss, answer tokens) over all held-out rows, of which each process reads a share."""
    import torch

    from fedspeed.data.batches import eval_batches

    data = own.data(CLIENT)
    assert len(data.val) % (ranks * BATCH) == 0  # all processes take the same number of passes
    batches = eval_batches(data.val[rank::ranks], BATCH, data.pad_id)
    engine.eval()
    with torch.no_grad():
        found = torch.tensor([
            [own.loss(batch, engine).item(), float(batch.answer_tokens)] for batch in batches
        ]).double()
    total = found.sum(0)
    torch.distributed.all_reduce(total)
    return total[0].item(), int(total[1].item())


def main(folder: Path, threads: int) -> None:
    """Train and evaluate as the plain loop does with one client whose optimizer state is kept."""
    import os

    import torch

    torch.set_num_threads(threads)
    ranks = int(os.environ["WORLD_SIZE"])
    here = accelerator(ranks)
    assert here.num_processes == ranks
    own = Trainer(folder, ALONE)
    engine, optimizer = here.prepare(own.model, own.new_optimizer())
    for number in range(ROUNDS):
        engine.train()
        for step in range(STEPS):
            batches = own.step_batches(CLIENT, number * STEPS + step, ranks=ranks, rank=here.process_index)
            optimizer.zero_grad()
            # DeepSpeed divides the sum of the processes' gradients by their number.
            here.backward(own.loss(batches.micro[0], engine) * ranks / batches.step_answer_tokens)
            optimizer.step()
        found = held_out(own, engine, ranks, here.process_index)
        if here.process_index == 0:
            print_round(number, *found)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

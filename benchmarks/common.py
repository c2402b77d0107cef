"""Random models and rows, DeepSpeed configurations, and processes, as several benchmarks need them."""

import multiprocessing
import os
import queue
import statistics
import sys
from pathlib import Path

# Untimed steps: ZeRO-3 records its trace in the first two, and layer-major decides which activations it keeps
# from the memory that is free after the first.
WARM_UP = 3


class Rows:
    """Random rows of one rank; the first half of each is prompt."""

    def __init__(self, args, rank: int):
        import numpy as np

        self._ids = lambda rows: np.random.default_rng(rank).integers(3, args.vocab, (rows, args.tokens))
        self._prompt = args.tokens // 2

    def step(self, micro: int, rows: int):
        """Return a step of `micro` micro-batches of `rows` rows."""
        import numpy as np

        from fedspeed.data.batches import Batch, StepBatches

        ids = self._ids(micro * rows).reshape(micro, rows, -1)
        labels = ids.copy()
        labels[:, :, : self._prompt] = -100
        batches = [
            Batch(i, label, np.ones_like(i), int((label[:, 1:] != -100).sum()))
            for i, label in zip(ids, labels)
        ]
        return StepBatches(batches, sum(b.answer_tokens for b in batches))


def write_model(folder: Path, args, blocks: int) -> None:
    """Write the configuration of a Llama with this number of blocks, without weights."""
    from transformers import LlamaConfig

    heads = max(1, args.hidden // 64)
    LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=args.vocab,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def ds_config(stage: int, dtype: str, live: int = 0, nvme: str = "") -> dict:
    """Return a DeepSpeed configuration.

    Args:
        stage: of ZeRO.
        live: stage 3: the most parameters that are gathered at once.
        nvme: stage 3: folder that parameters are offloaded to; empty: no offload.
    """
    zero = {"stage": stage, "overlap_comm": stage > 1, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": "auto",
        }
        if nvme:
            zero["offload_param"] = {
                "device": "nvme",
                "nvme_path": nvme,
                "buffer_size": "auto",
                "buffer_count": 12,
            }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def join_ranks(port: int, rank: int = 0, ranks: int = 1) -> None:
    """Join the torch world of some ranks on this machine; collective operations wait at most 600 s.

    Args:
        port: of the store, which rank 0 opens.
    """
    from fedspeed.engine.world import join_world, quiet

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    quiet()
    join_world(600)


def run_ranks(function, ranks: int, arguments) -> dict:
    """Run `function(*arguments(rank, port), results=queue)` for each rank in a new process and return the
    results by rank. The function puts (rank, result) into the queue.

    Raises:
        SystemExit: a rank ended without a result, whatever its exit code.
    """
    from fedspeed.net.ports import free_port

    port = free_port()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=function, args=arguments(r, port), kwargs={"results": results})
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    results_by_rank: dict = {}
    while len(results_by_rank) < ranks:
        # Exit codes first, then the queue: the result of a rank that has ended is in the queue by then.
        ended = [rank for rank, process in enumerate(processes) if process.exitcode is not None]
        try:
            results_by_rank.update([results.get(timeout=1)])
        except queue.Empty:
            if silent := [rank for rank in ended if rank not in results_by_rank]:
                for process in processes:
                    process.terminate()
                code = processes[silent[0]].exitcode
                sys.exit(f"rank {silent[0]} ended with {code} and without a result; see its output above")
    for process in processes:
        process.join()
    return results_by_rank


def quartiles(others: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile of the ratios of neighbouring steps; with a single
    pair its ratio three times.
    """
    ratios = [other / own for other, own in zip(others, ours)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high

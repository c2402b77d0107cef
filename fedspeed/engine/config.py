"""How a rank executes its clients: who shares the base, and what is recomputed."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    base_partition: Literal["cluster", "client", "rank"] = field(
        default="cluster",
        metadata={
            "help": (
                "ZeRO-3: ranks that share one copy of the frozen base (rank: every rank has a copy of "
                "its own)"
            )
        },
    )
    tier: Literal["auto", "stock", "resident", "int8", "nf4", "ram", "nvme", "client", "cluster"] = field(
        default="auto",
        metadata={
            "help": (
                "where the frozen base is stored: on every rank's device (resident; int8, nf4: "
                "quantised), once in each node's RAM or NVMe (ram, nvme), or divided over a client's "
                "or a cluster's ranks. stock: as the deepspeed section says, executed by DeepSpeed; "
                "auto: stock, but layer-major execution where ZeRO-3 would stream the base"
            )
        },
    )
    base_reads: Literal["gather", "one_sided"] = field(
        default="gather",
        metadata={
            "help": (
                "tier=client or cluster. gather: all ranks gather each block in the same order; "
                "one_sided: each node keeps its shard in RAM and serves it on request, so that no "
                "rank waits for another's pass (a node with several ranks then receives other nodes' "
                "shards once per rank)"
            )
        },
    )
    pipeline: Literal["none", "client", "cluster"] = field(
        default="none",
        metadata={
            "help": (
                "client: the ranks of a client form a pipeline over the blocks of the model; cluster: "
                "all ranks of a cluster do so for all its clients, whose activations and adapters its "
                "ranks then see (cluster.one_trust_domain)"
            )
        },
    )
    cuts: tuple[int, ...] | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": (
                "pipeline: first block of each stage except the first, such as [9, 20]; auto: "
                "balanced by speed and memory of the devices"
            ),
            "min": 1,
        },
    )
    resident_blocks: int = field(
        default=0,
        metadata={
            "help": (
                "streamed tiers: number of decoder blocks, spread over the depth, that stay on the "
                "device only, which saves the host memory that they would be loaded from; if host "
                "memory is sufficient, block_slots is the better use of device memory"
            ),
            "min": 0,
        },
    )
    base_gib: float = field(
        default=0.0,
        metadata={
            "help": (
                "streamed tiers: device memory for the base; as many block slots as fit into it. 0: "
                "block_slots decides"
            ),
            "min": 0.0,
            "max": 10_000.0,
        },
    )
    block_slots: int = field(
        default=2,
        metadata={
            "help": (
                "streamed tiers: device buffers for loaded blocks; 1: no prefetch; as many as blocks: "
                "nothing is loaded twice"
            ),
            "min": 1,
            "max": 1024,
        },
    )
    client_slots: int = field(
        default=0,
        metadata={
            "help": (
                "streamed tiers: clients of a rank that train in the same pass and share each load, "
                "0: all of them"
            ),
            "min": 0,
        },
    )
    block_inputs: Literal["auto", "device", "host"] = field(
        default="auto",
        metadata={
            "help": (
                "layer-major execution: where inputs of blocks are stored until the backward pass; "
                "auto: on the device up to activation_gib, the rest in host RAM"
            )
        },
    )
    activation_gib: float | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": (
                "layer-major execution: device memory for stored tensors of the backward pass: with "
                "block_inputs=auto first inputs of blocks, then activations, from the last block on, "
                "which are then not recomputed; auto: what a step leaves free on a GPU, a quarter of "
                "the free RAM on a CPU. The results are the same bit for bit"
            ),
            "min": 0.0,
            "max": 10_000.0,
        },
    )
    logits_mib: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": (
                "layer-major execution and pipelines: logits of answer tokens that are computed at a time "
                "[MiB], at least those of one token; several copies of them are on the device. auto: 256 on "
                "a GPU, 64 on a CPU. Losses differ by rounding"
            ),
            "min": 1,
            "max": 65_536,
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={
            "help": (
                "layer-major execution: compile a block with torch.compile, once for all blocks; "
                "useful for small micro-batches, where the GPU waits for Python"
            )
        },
    )
    matmul: Literal["default", "fp16_accumulation", "tf32"] = field(
        default="default",
        metadata={
            "help": (
                "arithmetic of matrix products on NVIDIA GPUs. fp16_accumulation: sums of fp16 "
                "products in fp16, about twice as fast on GeForce cards; tf32: fp32 products with a "
                "mantissa of 10 bits. Both change the losses (docs/gpu.md)"
            )
        },
    )
    deterministic: bool = field(
        default=False,
        metadata={
            "help": (
                "use deterministic operations only, which are slower on a GPU; without it, a resumed "
                "run on GPUs differs by rounding"
            )
        },
    )
    activation_checkpointing: bool = field(
        default=False,
        metadata={"help": "recompute each block in the backward pass instead of storing its activations"},
    )
    threads: int = field(
        default=0,
        metadata={
            "help": "CPU threads per rank, 0: the cores of the host divided by its ranks",
            "min": 0,
            "max": 1024,
        },
    )

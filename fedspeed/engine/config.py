"""How a rank executes its clients: who shares the base, and what is recomputed."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    base_partition: Literal["cluster", "client", "rank"] = field(
        default="cluster",
        metadata={
            "help": "ZeRO-3: which ranks share one copy of the frozen base (rank: each keeps or streams its "
            "own)"
        },
    )
    tier: Literal["auto", "stock", "resident", "int8", "nf4", "ram", "nvme", "client", "cluster"] = field(
        default="auto",
        metadata={
            "help": "where the frozen base lives: on every rank's device (int8, nf4: quantised there), once "
            "in each node's RAM or NVMe, divided over "
            "a client's or a cluster's ranks; stock: where DeepSpeed puts it, executed by DeepSpeed; auto: "
            "stock, but what ZeRO-3 would stream "
            "is executed layer by layer"
        },
    )
    base_reads: Literal["gather", "one_sided"] = field(
        default="gather",
        metadata={
            "help": "tiers divided over a client or a cluster: all ranks gather each block in the same "
            "order, or each node keeps its part in RAM and answers "
            "whoever asks, so that no rank waits for another's pass (a node with several ranks then "
            "receives the others' parts once for each)"
        },
    )
    pipeline: Literal["none", "client", "cluster"] = field(
        default="none",
        metadata={
            "help": "client: a client's ranks each hold some blocks of the model, and its micro-batches "
            "pass through them; cluster: so do all ranks of a cluster, "
            "for all its clients, whose activations and adapters its ranks then see "
            "(cluster.one_trust_domain)"
        },
    )
    cuts: tuple[int, ...] | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "pipeline: the first block of each stage but the first, such as [9, 20]; auto: by the "
            "speed and memory of the ranks' devices",
            "min": 1,
        },
    )
    resident_blocks: int = field(
        default=0,
        metadata={
            "help": "streamed tiers: so many decoder blocks, spread over the depth, live on the device "
            "only, which spares the memory that they would be "
            "loaded from; where there is enough of it, slots are worth more",
            "min": 0,
        },
    )
    base_gib: float = field(
        default=0.0,
        metadata={
            "help": "streamed tiers: device memory that the base may take; there are as many slots as fit "
            "into it. 0: slots says how many",
            "min": 0.0,
            "max": 10_000.0,
        },
    )
    block_slots: int = field(
        default=2,
        metadata={
            "help": "streamed tiers: places on the device for blocks that are loaded; with one, nothing is "
            "loaded ahead, with one for each block, nothing is "
            "loaded twice",
            "min": 1,
            "max": 1024,
        },
    )
    client_slots: int = field(
        default=0,
        metadata={
            "help": "streamed tiers: clients of a rank that train in the same pass and share each load, 0: "
            "all of them",
            "min": 0,
        },
    )
    block_inputs: Literal["auto", "device", "host"] = field(
        default="auto",
        metadata={
            "help": "layer by layer: where the inputs of blocks wait for the backward pass; auto: on the "
            "device as far as activation_gib goes, else in host RAM"
        },
    )
    activation_gib: float | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "layer by layer: device memory for what waits for the backward pass: with "
            "block_inputs=auto first the inputs of blocks, then activations of "
            "blocks, the last ones first, which are then not computed again; auto: what a step leaves free "
            "on a card, a quarter of the free RAM on a CPU. "
            "The results are the same bit for bit",
            "min": 0.0,
            "max": 10_000.0,
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={
            "help": "layer by layer: compile a block with torch.compile, once for all blocks; meant for "
            "small micro-batches, at which a GPU waits for Python"
        },
    )
    matmul: Literal["default", "fp16_accumulation", "tf32"] = field(
        default="default",
        metadata={
            "help": "arithmetic of matrix products on NVIDIA cards. fp16_accumulation: sums of fp16 "
            "products in fp16, about twice as fast on GeForce cards; "
            "tf32: fp32 products with 10 bits of mantissa. Both change the losses (docs/gpu.md)"
        },
    )
    deterministic: bool = field(
        default=False,
        metadata={
            "help": "only operations that give the same bits each time, which on a GPU is slower; without "
            "it a resumed run on GPUs is the same but for rounding"
        },
    )
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "recompute each block in the backward pass"}
    )
    threads: int = field(
        default=0,
        metadata={
            "help": "CPU threads per rank, 0: the cores divided by the local ranks",
            "min": 0,
            "max": 1024,
        },
    )

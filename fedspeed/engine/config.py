"""How a rank executes its clients: who shares the base, and what is recomputed."""

from dataclasses import dataclass, field
from typing import Literal

QUANTISED = ("int8", "nf4")  # values of EngineConfig.tier that need bitsandbytes

# What the planner and the probe must know of the execution too.
UNIT_ALIGN = 4096  # bytes; what reading past the page cache asks of offsets, lengths and addresses
READERS = 4  # threads that read one unit from disk: one read at a time leaves an NVMe disk half idle
READ_BYTES = 8 << 20  # of one read
LOGITS_BYTES = 1 << 26  # of one chunk of the vocabulary's logits, in the model's type
EVAL_TOKENS = 32_768  # of one evaluation pass: bounds the activations that wait between two blocks


@dataclass(frozen=True)
class EngineConfig:
    base_partition: Literal["cluster", "client", "rank"] = field(default="cluster", metadata={
        "help": "ZeRO-3: which ranks share one copy of the frozen base (rank: each keeps or streams its own)"})
    tier: Literal["auto", "stock", "resident", "int8", "nf4", "ram", "nvme", "client", "cluster"] = field(default="auto", metadata={
        "help": "where the frozen base lives: on every rank's device (int8, nf4: quantised there), once in each node's RAM or NVMe, divided over "
                "a client's or a cluster's ranks; stock: where DeepSpeed puts it, executed by DeepSpeed; auto: stock, but what ZeRO-3 would stream "
                "is executed layer by layer"})
    base_reads: Literal["gather", "one_sided"] = field(default="gather", metadata={
        "help": "tiers divided over a client or a cluster: all ranks gather each block in the same order, or each node keeps its part in RAM and answers "
                "whoever asks, so that no rank waits for another's pass (a node with several ranks then receives the others' parts once for each)"})
    pipeline: Literal["none", "client", "cluster"] = field(default="none", metadata={
        "help": "client: a client's ranks each hold some blocks of the model, and its micro-batches pass through them; cluster: so do all ranks of a cluster, "
                "for all its clients, whose activations and adapters its ranks then see (cluster.one_trust_domain)"})
    cuts: str = field(default="auto", metadata={
        "help": "pipeline: the first block of each stage but the first, as 9,20; auto: by the speed and memory of the ranks' devices"})
    resident_blocks: int = field(default=0, metadata={
        "help": "streamed tiers: so many decoder blocks stay on the device", "min": 0})
    base_gib: float = field(default=0.0, metadata={
        "help": "streamed tiers: device memory that the base may take; as many blocks stay there as fit beside the slots. 0: resident_blocks says how many",
        "min": 0.0, "max": 10_000.0})
    slots: int = field(default=2, metadata={
        "help": "streamed tiers: places on the device for blocks that are loaded; with one, nothing is loaded ahead", "min": 1, "max": 64})
    seats: int = field(default=0, metadata={
        "help": "streamed tiers: clients of a rank that train in the same pass and share each load, 0: all of them", "min": 0})
    block_inputs: Literal["auto", "device", "host"] = field(default="auto", metadata={
        "help": "streamed tiers: where the inputs of blocks wait for the backward pass; auto: in host RAM where there is an accelerator"})
    activation_checkpointing: bool = field(default=False, metadata={"help": "recompute each block in the backward pass"})
    threads: int = field(default=0, metadata={"help": "CPU threads per rank, 0: the cores divided by the local ranks", "min": 0, "max": 1024})

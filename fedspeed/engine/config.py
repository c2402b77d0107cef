"""How a rank executes its clients: who shares the base, and what is recomputed."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    base_partition: Literal["cluster", "client", "rank"] = field(default="cluster", metadata={
        "help": "ZeRO-3: which ranks share one copy of the frozen base (rank: each keeps or streams its own)"})
    activation_checkpointing: bool = field(default=False, metadata={"help": "recompute each block in the backward pass"})
    threads: int = field(default=0, metadata={"help": "CPU threads per rank, 0: the cores divided by the local ranks", "min": 0, "max": 1024})

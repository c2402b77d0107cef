"""What `federation.method: {name: lora_average}` may be told."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Config:
    name: Literal["lora_average"] = "lora_average"
    rule: Literal["avg_factors", "freeze_a", "alternate"] = field(
        default="avg_factors",
        metadata={
            "help": "avg_factors: mean of A and of B, or of whatever is trained; freeze_a: train only B; "
            "alternate: B and A in turn by round"
        },
    )

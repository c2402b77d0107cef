"""Options of the method `fedprox` (`federation.method: {name: fedprox}`)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Config:
    name: Literal["fedprox"] = "fedprox"
    mu: float = field(
        default=0.01,
        metadata={
            "help": "weight of the proximal term: half of mu times the squared distance from the weights "
            "that a client began with is added to its loss",
            "above": 0.0,
        },
    )

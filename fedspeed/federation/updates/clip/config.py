"""Options of the transform `clip` (`federation.updates: [{name: clip}]`)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Config:
    name: Literal["clip"] = "clip"
    norm: float = field(
        default=1.0,
        metadata={
            "help": (
                "largest Euclidean norm of a client's delta, a longer one is scaled down before it is sent; "
                "equal on all sites, but nobody can check that another participant clips"
            ),
            "above": 0.0,
        },
    )

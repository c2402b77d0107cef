"""How updates travel between clients."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RoutingConfig:
    mode: Literal["plain"] = field(default="plain", metadata={"help": "plain: an ordinary sum, inside one trust domain"})
    transport: Literal["auto", "mpi", "gloo", "local"] = field(default="auto", metadata={
        "help": "auto: mpi under mpirun, gloo elsewhere, local with a single participant"})
    deadline_s: float = field(default=1800.0, metadata={
        "help": "longest wait for the other clients' updates of a round", "above": 0.0, "max": 10_000_000})

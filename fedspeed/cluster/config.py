"""How clients are placed on the ranks that the launcher provides."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ClusterConfig:
    """Keys of `cluster`."""

    ranks_per_client: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": (
                "ranks of each client; auto: all slots of a host if there is a host for each client, "
                "else fewer; a number above a host's slots must be whole hosts"
            ),
            "min": 1,
        },
    )
    local_ranks: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": (
                "ranks that `python launch.py` starts for clients on one machine; auto: one per GPU, on CPUs "
                "the number that makes a round shortest; the server of a method is one more"
            ),
            "min": 1,
        },
    )
    probe: str = field(
        default="",
        metadata={
            "help": (
                "file that `fedspeed probe` wrote on a machine like these; the report then compares "
                "predicted with measured seconds"
            ),
            "path": (),
        },
    )
    one_trust_domain: bool = field(
        default=False,
        metadata={
            "help": (
                "the clients of each cluster trust each other with their activations and adapters, "
                "which engine.pipeline=cluster shows to them, whatever routing.mode hides from other "
                "clusters"
            )
        },
    )
    max_restarts: int = field(
        default=2,
        metadata={
            "help": (
                "how often a local run that lost a rank is restarted from its journal without "
                "finishing another round"
            ),
            "min": 0,
        },
    )
    finish_s: float = field(
        default=25.0,
        metadata={
            "help": (
                "how long the ranks of a local run may take to finish their round after SIGTERM or Ctrl-C"
            ),
            "above": 0.0,
            "max": 10_000_000,
        },
    )
    start_timeout_s: float = field(
        default=300.0,
        metadata={
            "help": "longest wait until all ranks have found each other",
            "above": 0.0,
            "max": 10_000_000,
        },
    )
    heartbeat_timeout_s: float = field(
        default=60.0,
        metadata={
            "help": "a rank without a heartbeat for this long is lost, for instance after a power failure",
            "above": 0.0,
            "max": 10_000_000,
        },
    )

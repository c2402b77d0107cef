"""How clients are placed on the ranks that the launcher provides."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ClusterConfig:
    """Keys of `cluster`."""

    ranks_per_client: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "auto: all slots of a host while there is a host for each client, else fewer; a number "
            "beyond a host's slots: whole hosts",
            "min": 1,
        },
    )
    local_ranks: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "ranks that `python launch.py` starts on one machine; auto: one per GPU, on CPU as many "
            "as make a round shortest",
            "min": 1,
        },
    )
    probe: str = field(
        default="",
        metadata={
            "help": "what `fedspeed probe` wrote on a machine like these; then the report holds predicted "
            "against measured seconds",
            "path": (),
        },
    )
    one_trust_domain: bool = field(
        default=False,
        metadata={
            "help": "the clients of each cluster trust each other with their activations and adapters: what "
            "engine.pipeline=cluster shows them, whatever "
            "routing.mode hides from the other clusters"
        },
    )
    max_restarts: int = field(
        default=2,
        metadata={"help": "how often a local run that lost a rank starts again from its journal", "min": 0},
    )
    finish_s: float = field(
        default=25.0,
        metadata={
            "help": "how long the ranks of a local run may go on with their round after SIGTERM or Ctrl-C",
            "above": 0.0,
            "max": 10_000_000,
        },
    )
    start_timeout_s: float = field(
        default=300.0,
        metadata={"help": "deadline for all ranks to find each other", "above": 0.0, "max": 10_000_000},
    )
    heartbeat_timeout_s: float = field(
        default=60.0,
        metadata={
            "help": "a rank that gives no sign of life for so long is lost, for instance on a machine "
            "without power",
            "above": 0.0,
            "max": 10_000_000,
        },
    )

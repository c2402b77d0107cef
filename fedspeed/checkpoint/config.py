"""The section `checkpoint` of the configuration."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckpointConfig:
    """Hold the settings of the round journal."""

    every: int = field(default=1, metadata={"help": "rounds between journal entries", "min": 1})
    keep: int = field(default=2, metadata={"help": "number of journal entries to keep", "min": 1})

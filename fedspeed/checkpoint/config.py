"""What is kept of a run, so that the same command resumes it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(default=1, metadata={"help": "rounds between journal entries", "min": 1})
    keep: int = field(default=2, metadata={"help": "journal entries kept", "min": 1})

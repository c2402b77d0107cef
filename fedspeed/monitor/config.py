"""What is shown and written while a run goes on."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MonitorConfig:
    tensorboard: bool = field(default=True, metadata={"help": "write TensorBoard events to <run>/tensorboard"})
    progress: bool = field(default=True, metadata={"help": "live progress line with ETA"})
    plot: bool = field(default=True, metadata={"help": "draw report.png at the end"})

"""The `monitor` section of the configuration: what a run shows and writes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MonitorConfig:
    """The `monitor` section of the configuration."""

    tensorboard: bool = field(
        default=True, metadata={"help": "write TensorBoard events to <run>/tensorboard"}
    )
    progress: bool = field(default=True, metadata={"help": "live progress line with ETA"})
    trace_rounds: int = field(
        default=0,
        metadata={
            "help": "write what each rank did when, in so many rounds from the start, to <run>/trace on its "
            "own host (for https://ui.perfetto.dev)",
            "min": 0,
            "max": 1000,
        },
    )
    plot: bool = field(default=True, metadata={"help": "draw report.png at the end"})

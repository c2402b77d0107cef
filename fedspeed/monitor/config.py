"""The `monitor` section of the configuration: what a run shows and writes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class MonitorConfig:
    """The `monitor` section of the configuration."""

    tensorboard: bool = field(
        default=True, metadata={"help": "write TensorBoard events to <run>/tensorboard"}
    )
    progress: bool = field(default=True, metadata={"help": "show a live progress line with the time left"})
    trace_rounds: int = field(
        default=0,
        metadata={
            "help": (
                "write a timeline of each rank's first rounds, this many, to <run>/trace on its host "
                "(for https://ui.perfetto.dev)"
            ),
            "min": 0,
            "max": 1000,
        },
    )
    plot: bool = field(default=True, metadata={"help": "draw report.png at the end of the run"})

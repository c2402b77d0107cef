"""How long a round takes, what for, and how much is trained in it."""

from fedspeed.monitor.clock import STAGES
from fedspeed.monitor.metrics.metric import Metric

METRICS = (
    # Wall time of the round, with what was done since the last one.
    Metric(name="seconds", unit="seconds", per="rank", reduce="mean", of="wall_s", always=True,
           shown_masked=True, tag="seconds/round", column="time", over_rounds="sum", title="time in rounds"),
    Metric(name="tokens", unit="tokens", per="client", reduce="sum", always=True, shown_masked=True,
           over_rounds="sum", title="tokens trained"),
    Metric(name="tokens_per_s", unit="tokens/s", per="round", reduce="ratio", of="tokens", over="seconds",
           always=True, shown_masked=True, tag="speed/tokens_per_s", column="tokens/s", over_rounds="ratio",
           title="trained tokens per second", panel="trained tokens/s"),
    # Means over the ranks, so that they add up to at most `seconds`.
    *(Metric(name=f"{stage}_s", unit="seconds", per="rank", reduce="mean", always=True, shown_masked=True,
             tag=f"seconds/{stage}") for stage in STAGES),
    # Of each client. Exchange and idle time are those of its ranks, which clients may share.
    Metric(name="local_steps", unit="count", per="client", reduce="sum", of="steps", record="client",
           always=True, tag="local_steps", column="local steps"),
    Metric(name="tokens", unit="tokens", per="client", reduce="sum", record="client", always=True,
           tag="tokens", column="tokens"),
    *(Metric(name=f"{stage}_s", unit="seconds", per="client", reduce="sum", record="client", always=True,
             tag=f"seconds/{stage}", column=stage) for stage in STAGES),
)

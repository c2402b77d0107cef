"""Metrics of a round's duration by stage, and of the training speed."""

from fedspeed.monitor.clock import STAGES
from fedspeed.monitor.metrics.metric import NOTHING, WEIGHTS, Metric

METRICS = (
    # Wall time from the end of the previous round to the end of this one.
    Metric(
        name="seconds",
        unit="seconds",
        per="rank",
        reduce="mean",
        of="wall_s",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
        tag="seconds/round",
        column="time",
        over_rounds="sum",
        title="time in rounds",
    ),
    Metric(
        name="tokens",
        unit="tokens",
        per="client",
        reduce="sum",
        shown_masked=True,
        reveals=frozenset({WEIGHTS}),
        over_rounds="sum",
        title="tokens trained",
    ),
    Metric(
        name="tokens_per_s",
        unit="tokens/s",
        per="round",
        reduce="ratio",
        of="tokens",
        over="seconds",
        shown_masked=True,
        reveals=frozenset({WEIGHTS}),
        tag="speed/tokens_per_s",
        column="tokens/s",
        over_rounds="ratio",
        title="trained tokens per second",
        panel="trained tokens/s",
    ),
    # Means over the ranks, so that they add up to at most `seconds`.
    *(
        Metric(
            name=f"{stage}_s",
            unit="seconds",
            per="rank",
            reduce="mean",
            always=True,
            shown_masked=True,
            reveals=NOTHING,
            tag=f"seconds/{stage}",
        )
        for stage in STAGES
    ),
    # For each client. Exchange and idle time are those of its ranks, which clients may share.
    Metric(
        name="local_steps",
        unit="count",
        per="client",
        reduce="sum",
        of="steps",
        record="client",
        always=True,
        reveals=NOTHING,
        tag="local_steps",
        column="local steps",
    ),
    Metric(
        name="tokens",
        unit="tokens",
        per="client",
        reduce="sum",
        record="client",
        reveals=frozenset({WEIGHTS}),
        tag="tokens",
        column="tokens",
    ),
    *(
        Metric(
            name=f"{stage}_s",
            unit="seconds",
            per="client",
            reduce="sum",
            record="client",
            always=True,
            reveals=NOTHING,
            tag=f"seconds/{stage}",
            column=stage,
        )
        for stage in STAGES
    ),
)

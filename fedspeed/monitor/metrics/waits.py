"""Metrics of a local step's duration and of waiting in pipelines and exchanges."""

from fedspeed.monitor.metrics.metric import NOTHING, Metric

METRICS = (
    # Seconds of a local step on the slowest rank; no value if no step was timed.
    Metric(name="step_s", unit="seconds", per="rank", reduce="max", reveals=NOTHING, over_rounds="median"),
    # Share of a pipeline's training time in which its ranks did not compute; no value without a pipeline.
    Metric(
        name="bubble",
        unit="share",
        per="rank",
        reduce="ratio",
        of="bubble_s",
        over="passes_s",
        shown_masked=True,
        reveals=NOTHING,
        tag="overlap/bubble",
        over_rounds="median",
        title="idle part of the pipelines' passes, median round",
    ),
    # Share of the exchange that was hidden behind training. Less than 1 % is within the accuracy of the
    # clocks.
    Metric(
        name="overlap",
        unit="share",
        per="rank",
        reduce="ratio",
        of="waited_s",
        over="exchanged_s",
        rest=True,
        shown_masked=True,
        reveals=NOTHING,
        tag="overlap/exchange_hidden",
        over_rounds="median",
        title="exchange hidden behind training, median round",
        row_from=0.01,
    ),
)

"""Metrics of the aggregation of updates."""

from fedspeed.monitor.metrics.metric import NOTHING, SKETCH, Metric

METRICS = (
    # Learning rate of the round's last local step.
    Metric(
        name="lr",
        unit="number",
        per="round",
        reduce="same",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
        tag="federation/learning_rate",
        column="learning rate",
    ),
    # Euclidean norm of the aggregated update, or of the delta of the products B A if these are averaged.
    Metric(
        name="update_norm",
        unit="number",
        per="round",
        reduce="same",
        shown_masked=True,
        reveals=NOTHING,
        tag="federation/update_norm",
        column="update norm",
    ),
    # Relative error of averaging A and B separately; no value for a method without this error.
    Metric(
        name="factor_error",
        unit="number",
        per="round",
        reduce="same",
        shown_masked=True,
        reveals=frozenset({SKETCH}),
        tag="federation/factor_error",
        column="factor error",
    ),
    # Whether the factor error is exact; else it is estimated from random probes, with one significant digit.
    Metric(
        name="factor_error_exact",
        unit="flag",
        per="round",
        reduce="same",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
    ),
    # Values of all updates that a masked sum has cut off, because a participant stated a wrong size.
    Metric(
        name="clipped",
        unit="count",
        per="round",
        reduce="same",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
        over_rounds="sum",
    ),
    # 1 for a round whose updates were not applied, because a masked sum of the round had been settled before
    # over other participants; the state stayed as it was.
    Metric(
        name="skipped",
        unit="count",
        per="round",
        reduce="same",
        shown_masked=True,
        reveals=NOTHING,
        tag="federation/skipped",
        tag_from=1,
        over_rounds="sum",
        title="rounds that were skipped",
        row_from=1,
    ),
)

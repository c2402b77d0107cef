"""What the federation did with the updates."""

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
    # Euclidean norm of the aggregated update; of the change of the products B A where these are averaged.
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
    # Relative error of averaging A and B apart from each other; no value where the method has none.
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
    # Else it is an estimate, from random probes, of which the first digit counts.
    Metric(
        name="factor_error_exact",
        unit="flag",
        per="round",
        reduce="same",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
    ),
    # Values of all updates beyond what a masked sum carries, which counted for less: a wrong size was told.
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
)

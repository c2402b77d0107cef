"""Metrics of the model's quality, and the number of updates in each round."""

from fedspeed.monitor.metrics.metric import LOSSES, NOTHING, WEIGHTS, Metric

METRICS = (
    # Mean training loss per answer token over the clients; no value in a round without training.
    Metric(
        name="train_loss",
        unit="loss",
        per="client",
        reduce="ratio",
        over="tokens",
        record="both",
        shown_masked=True,
        reveals=frozenset({LOSSES, WEIGHTS}),
        tag="loss/train",
        column="train loss",
    ),
    # The same on held-out rows; no value in a round without evaluation. Likewise the next metric.
    Metric(
        name="val_loss",
        unit="loss",
        per="client",
        reduce="ratio",
        over="val_tokens",
        record="both",
        shown_masked=True,
        reveals=frozenset({LOSSES}),
        tag="loss/held_out",
        column="held-out loss",
    ),
    # Share of the held-out answers whose tokens are all the most likely ones, given the correct previous
    # tokens.
    Metric(
        name="val_exact",
        unit="accuracy",
        per="client",
        reduce="ratio",
        of="exact",
        over="rows",
        record="both",
        shown_masked=True,
        reveals=frozenset({LOSSES}),
        tag="accuracy/held_out_exact",
        column="held-out exact",
        over_rounds="last",
        title="held-out answers exactly right, last",
        panel="held-out answers\nexactly right",
    ),
    # Clients from which an update was requested, and updates that counted.
    Metric(
        name="clients",
        unit="count",
        per="client",
        reduce="sum",
        of="asked",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
    ),
    Metric(
        name="received",
        unit="count",
        per="client",
        reduce="sum",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
        tag="federation/updates_received",
        column="updates",
    ),
)

"""How well the model answers, and on how many updates that rests."""

from fedspeed.monitor.metrics.metric import LOSSES, NOTHING, WEIGHTS, Metric

METRICS = (
    # Mean per answer token over the clients, in training; no value in a round in which nothing was trained.
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
    # The same on held-out rows; no value in a round that was not evaluated, and so for the next one.
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
    # Part of the held-out answers whose every token is the likeliest one, given the right ones before it.
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
    # Clients that were asked for an update, and updates that counted.
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

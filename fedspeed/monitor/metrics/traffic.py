"""What is sent, kept and loaded, in bytes."""

from fedspeed.monitor.metrics.metric import GIB, NOTHING, Metric

METRICS = (
    # By all gateways together, in the exchange of updates.
    Metric(
        name="bytes_sent",
        unit="bytes",
        per="rank",
        reduce="sum",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
        tag="network/bytes_sent",
        column="sent",
        over_rounds="sum",
        title="sent between clients",
    ),
    # The most that a process has held (monitor.clock.peak_bytes), and that tensors took on a device.
    Metric(
        name="peak_bytes",
        unit="bytes",
        per="rank",
        reduce="max",
        reveals=NOTHING,
        tag="memory/peak_gib",
        tag_scale=GIB,
        over_rounds="max",
        title="peak memory of a rank",
    ),
    Metric(
        name="device_bytes",
        unit="bytes",
        per="rank",
        reduce="max",
        reveals=NOTHING,
        tag="memory/device_gib",
        tag_scale=GIB,
        over_rounds="max",
        title="most that tensors took on a device",
    ),
    # Of the frozen base, onto the devices of all ranks, from the run's tier; waiting for it is gather_s.
    Metric(
        name="loaded_bytes",
        unit="bytes",
        per="rank",
        reduce="sum",
        always=True,
        shown_masked=True,
        reveals=NOTHING,
        tag="base/loaded_gib",
        tag_scale=GIB,
        tag_from=1,
        over_rounds="sum",
        title="base loaded onto devices",
        row_from=1,
    ),
    # Of each client, those of its ranks, which clients may share.
    Metric(
        name="bytes_sent",
        unit="bytes",
        per="client",
        reduce="sum",
        record="client",
        always=True,
        reveals=NOTHING,
        tag="network/bytes_sent",
    ),
    Metric(
        name="peak_bytes",
        unit="bytes",
        per="client",
        reduce="sum",
        record="client",
        always=True,
        reveals=NOTHING,
        tag="memory/peak_gib",
        tag_scale=GIB,
    ),
)

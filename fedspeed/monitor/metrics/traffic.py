"""Metrics of sent bytes, memory and loaded bytes."""

from fedspeed.monitor.metrics.metric import GIB, NOTHING, Metric

METRICS = (
    # Bytes sent by all gateways together in the exchange of updates.
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
        title="sent by all participants",
    ),
    # Peak memory of a process (monitor.clock.peak_bytes), and of tensors on a device.
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
    # Bytes of the frozen base that all ranks load onto their devices; the time to wait for them is in
    # gather_s.
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
    # For each client, those of its ranks, which clients may share.
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
    Metric(
        name="device_bytes",
        unit="bytes",
        per="client",
        reduce="sum",
        record="client",
        reveals=NOTHING,
        tag="memory/device_gib",
        tag_scale=GIB,
    ),
)

"""Metrics of the transforms of updates (`federation.updates`). A transform reports amounts by slot. All
ranks of a client report the same amounts, so that summing over ranks does not change a ratio.
"""

from fedspeed.monitor.metrics.metric import Metric

METRICS = (
    # Share of the clients' updates that `clip` has shortened; no value without `clip`. The sum over all
    # clients reveals no more about one client than the sum of the updates does.
    Metric(
        name="shortened",
        unit="share",
        per="rank",
        reduce="ratio",
        of="clip_shortened",
        over="clip_updates",
        shown_masked=True,
        tag="updates/shortened",
        column="shortened",
        over_rounds="median",
        title="updates that were shortened, median round",
    ),
    # Mean Euclidean norm of an update before `clip`; not published if updates are masked.
    Metric(
        name="unclipped_norm",
        unit="number",
        per="rank",
        reduce="ratio",
        of="clip_norms",
        over="clip_updates",
        tag="updates/unclipped_norm",
        column="norm before clip",
    ),
)

"""What the transforms of updates (`federation.updates`) did. A transform tells amounts by slot; ranks of one
client tell the same, so that ratios stay what they are.
"""

from fedspeed.monitor.metrics.metric import Metric

METRICS = (
    # Part of the clients' updates that `clip` has shortened; no value without one. The sum over all says no
    # more of one client than that of its update.
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
    # Mean Euclidean norm of an update before `clip`, which nobody is told where updates are masked.
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

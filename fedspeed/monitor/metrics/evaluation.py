"""The scores of evaluation tasks on the common model of a round, one metric for each registered task.

The ranks divide the items of a task, and each adds the sum of its items' scores and their weight to its
slots. A public task scores the common model, which all participants have, on data that anybody has: the
score reveals nothing about a client. A task on clients' held-out rows reveals their loss.
"""

from fedspeed.evaluation.config import EVAL_TASKS, EvalTaskEntry
from fedspeed.monitor.metrics.metric import LOSSES, NOTHING, Metric


def score_slot(task: str) -> str:
    """Return the slot of the sum of an evaluation task's scores."""
    return f"eval_{task}"


def weight_slot(task: str) -> str:
    """Return the slot of the sum of their weights: the number of items, unless the task weights them."""
    return f"eval_{task}_weight"


def _metric(name: str, entry: EvalTaskEntry) -> Metric:
    return Metric(
        name=score_slot(name),
        unit=entry.unit,
        per="rank",
        reduce="ratio",
        over=weight_slot(name),
        shown_masked=True,
        reveals=frozenset({LOSSES}) if entry.private else NOTHING,
        tag=f"eval/{name}",
        column=f"eval: {name} {entry.unit}",
        over_rounds="last",
        title=f"evaluation of {name}: {entry.unit}, last",
        panel=f"eval: {name}\n{entry.unit}",
        task=name,
    )


METRICS = tuple(_metric(name, entry) for name, entry in EVAL_TASKS.items())

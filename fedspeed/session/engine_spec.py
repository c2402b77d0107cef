"""The specification of a rank's engine: from the configuration, changed by the method for the rank's role."""

import operator
from dataclasses import replace
from typing import Any, Literal

from fedspeed.config.run import RunConfig
from fedspeed.engine.spec import EngineSpec
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.models.planned_shape import planned_shape

# Other parts of the run read these from the configuration, so that a method may not change them.
FIXED = (
    "role",
    "model",
    "adapter.method",
    "engine.pipeline",
    "engine.client_slots",
    "train.micro_batch",
    "train.accumulation",
    "train.local_steps",
    "train.local_steps_by_cluster",
    "train.lr",
    "train.schedule",
    "train.warmup_steps",
)


def engine_spec(
    config: RunConfig, deepspeed: dict[str, Any], role: Literal["client", "server"]
) -> EngineSpec:
    """Return the specification of a rank's engine.

    The base is read only for a method that changes the specification.

    Args:
        deepspeed: the merged section (config.deepspeed.merge). role: of the rank.

    Raises:
        ModelError: the base is not known.
        ValueError: the method changes a value that other parts of the run rely on (FIXED).
    """
    spec = replace(EngineSpec.of(config, deepspeed), role=role)
    chosen = config.federation.method
    method = method_class(chosen.name)
    if getattr(method.spec, "__func__", None) is getattr(Method.spec, "__func__", None):  # not overridden
        return spec
    changed = method.spec(chosen, spec, shape=planned_shape(config.model.base))
    for name in FIXED:
        old, new = (operator.attrgetter(name)(which) for which in (spec, changed))
        if old != new:
            raise ValueError(
                f"federation.method={chosen.name} would build an engine with {name}={new}, but other "
                f"parts of the run use the configuration's {old}; its `spec` must not change it"
            )
    return changed

"""Which engine a rank is to build: what the configuration asks for, as the method changes it by role."""

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from fedspeed.config.run import RunConfig
from fedspeed.engine.spec import EngineSpec
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.models.planned import planned_shape

# What others than the engine decide by too, from the configuration: a method may not build anything else.
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


def engine_spec(config: RunConfig, deepspeed: Mapping, role: Literal["client", "server"]) -> EngineSpec:
    """Return what is to be built. The base is looked at only for a method that asks for its shape.

    Args:
        deepspeed: the merged section (config.deepspeed.merge).

    Raises:
        ModelError: the base is not known.
        ValueError: the method changes something that is not the engine's alone (FIXED).
    """
    spec = replace(EngineSpec.of(config, deepspeed), role=role)
    chosen = config.federation.method
    method = method_class(chosen.name)
    if method.spec.__func__ is Method.spec.__func__:
        return spec
    changed = method.spec(chosen, spec, shape=planned_shape(config.model.base))
    for name in FIXED:
        old, new = (operator.attrgetter(name)(which) for which in (spec, changed))
        if old != new:
            raise ValueError(
                f"federation.method={chosen.name} would build an engine with {name}={new}, but others "
                "decide by "
                f"the configuration's {old}; its `spec` must leave that as it is"
            )
    return changed

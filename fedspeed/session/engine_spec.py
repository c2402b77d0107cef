"""Which engine a rank is to build: what the configuration asks for, as the method changes it by role."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from fedspeed.config.run import RunConfig
from fedspeed.engine.spec import EngineSpec
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.models.planned import planned_shape


def engine_spec(config: RunConfig, deepspeed: Mapping, role: Literal["client", "server"]) -> EngineSpec:
    """Return what is to be built. The base is looked at only for a method that asks for its shape.

    Args:
        deepspeed: the merged section (config.deepspeed.merge).

    Raises:
        ModelError: the base is not known.
    """
    spec = replace(EngineSpec.of(config, deepspeed), role=role)
    chosen = config.federation.method
    method = method_class(chosen.name)
    if method.spec.__func__ is Method.spec.__func__:
        return spec
    return method.spec(chosen, spec, shape=planned_shape(config.model.base))

"""The kinds of engines, and what each is capable of. Without torch, so that a method that needs more than an
engine can do is refused before anything starts.
"""

from collections.abc import Collection, Mapping
from typing import Literal, get_args

from fedspeed.engine.base.placement import choose_tier
from fedspeed.engine.config import EngineConfig
from fedspeed.errors import ConfigError

Kind = Literal["stock", "streamed", "client_pipeline", "cluster_pipeline", "split"]

# What a method may need of an engine, besides loading, evaluating and reading states; see the methods of
# `ClientEngine`. `split` is the capability of an engine that computes a part of the model, and no other
# (engine.split.ends, engine.split.body).
Capability = Literal[
    "gradients", "add_to_gradients", "perturb", "generate", "logprobs", "forward_gradients", "distil", "split"
]

_ALL: frozenset[Capability] = frozenset({"gradients", "add_to_gradients", "perturb", "generate", "logprobs"})
_WHOLE: frozenset[Capability] = frozenset({"forward_gradients", "distil"})  # computed with whole parameters
CAPABILITIES: dict[Kind, frozenset[Capability]] = {
    "stock": _ALL | _WHOLE,
    "streamed": _ALL,
    "client_pipeline": _ALL,
    "cluster_pipeline": _ALL,
    "split": frozenset({"split"}),
}

# What in a configuration means a kind.
_SETTINGS: dict[Kind, str] = {
    "stock": "engine.tier=stock",
    "streamed": "engine.tier=resident, ram or nvme",
    "client_pipeline": "engine.pipeline=client",
    "cluster_pipeline": "engine.pipeline=cluster",
    "split": "a method that splits the model",
}


def kind_of(engine: EngineConfig, deepspeed: Mapping, *, frozen: bool, outside: str = "") -> Kind:
    """Return the kind of engine that a configuration means.

    Args:
        deepspeed: the DeepSpeed section.
        frozen: whether any parameter is frozen.
        outside: name of a parameter that trains outside the decoder blocks; empty if there is none, or if the
            model has not been read yet.

    Raises:
        FedSpeedError: the tier that is asked for cannot train the trainable parameters.
    """
    if engine.pipeline == "client":
        return "client_pipeline"
    if engine.pipeline == "cluster":
        return "cluster_pipeline"
    tier = choose_tier(engine, dict(deepspeed), frozen, outside)
    return "stock" if tier == "stock" else "streamed"


def capabilities_of(kind: Kind, zero_stage: int = 0) -> frozenset[Capability]:
    """Return what a kind of engine is capable of under a stage of ZeRO."""
    return CAPABILITIES[kind] - _WHOLE if zero_stage == 3 else CAPABILITIES[kind]


def check_capabilities(needs: Collection[Capability], kind: Kind, asker: str, *, zero_stage: int = 0) -> None:
    """Check that a kind of engine has the capabilities that a method needs.

    Args:
        asker: the setting that needs them, as `federation.method=NAME`.
        zero_stage: of the engine's DeepSpeed section.

    Raises:
        ConfigError: it lacks one; the message names the kinds that have all.
        ValueError: a need is not the name of a capability.
    """
    if unknown := sorted(set(needs) - set(get_args(Capability))):
        raise ValueError(
            f"{asker} needs {', '.join(unknown)}, which is no capability; engine/capabilities.py has "
            f"{', '.join(get_args(Capability))}, and a new one is a name there"
        )
    missing = sorted(set(needs) - capabilities_of(kind, zero_stage))
    if not missing:
        return
    able = [_SETTINGS[other] for other, has in CAPABILITIES.items() if set(needs) <= has]
    stage = " with zero_optimization.stage=2 or less (deepspeed.base=zero0.json)" * bool(_WHOLE & set(needs))
    engine = f"{kind} with zero_optimization.stage=3" if zero_stage == 3 else kind
    remedy = (
        f"choose {' or '.join(able)}{stage}, or another method"
        if able
        else f"no engine is yet (known are {', '.join(get_args(Capability))}); choose another method"
    )
    raise ConfigError(
        f"{asker} needs an engine that is capable of {', '.join(missing)}, which {engine} is not (it comes "
        f"from {_SETTINGS[kind]}): {remedy}"
    )

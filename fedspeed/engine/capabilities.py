"""What kinds of engines there are, which one a configuration means, and what each is capable of. Pure,
without torch: so that a method that asks for more is refused before anything starts.
"""

from collections.abc import Collection, Mapping
from typing import Literal, get_args

from fedspeed.engine.base.choose import choose_tier
from fedspeed.engine.config import EngineConfig
from fedspeed.errors import ConfigError

Kind = Literal["stock", "streamed", "client_pipeline", "cluster_pipeline"]

# What a method may ask of an engine beside loading, evaluating and reading states; see the methods of
# `ClientEngine`. One that no kind has yet is refused with all of them.
Capability = Literal["gradients", "add_to_gradients", "perturb", "generate", "logprobs", "forward_gradients"]

_ALL: frozenset[Capability] = frozenset({"gradients", "add_to_gradients", "perturb", "generate", "logprobs"})
CAPABILITIES: dict[Kind, frozenset[Capability]] = {
    "stock": _ALL,
    "streamed": _ALL,
    "client_pipeline": _ALL,
    "cluster_pipeline": _ALL,
}


def kind_of(engine: EngineConfig, deepspeed: Mapping, *, frozen: bool, outside: str = "") -> Kind:
    """Tell which kind of engine a configuration means.

    Args:
        deepspeed: the DeepSpeed section.
        frozen: whether anything of the model is frozen.
        outside: name of something that trains outside the decoder blocks; empty where nothing does, or where
            it is not known yet, since the model has not been looked into.

    Raises:
        FedSpeedError: the configuration asks for a tier that cannot train what it shall.
    """
    if engine.pipeline == "client":
        return "client_pipeline"
    if engine.pipeline == "cluster":
        return "cluster_pipeline"
    tier = choose_tier(engine, dict(deepspeed), frozen, outside)
    return "stock" if tier == "stock" else "streamed"


def capabilities_of(kind: Kind) -> frozenset[Capability]:
    """Tell what a kind of engine is capable of."""
    return CAPABILITIES[kind]


def check_capabilities(needs: Collection[Capability], kind: Kind, asker: str) -> None:
    """Check that a kind of engine can do what is asked of it.

    Args:
        asker: the setting that asks, as `federation.method=NAME`.

    Raises:
        ConfigError: it cannot; says which kinds can.
        ValueError: a need is no capability by name.
    """
    if unknown := sorted(set(needs) - set(get_args(Capability))):
        raise ValueError(
            f"{asker} needs {', '.join(unknown)}, which is no capability; engine/capabilities.py has "
            f"{', '.join(get_args(Capability))}, and a new one is a name there"
        )
    missing = sorted(set(needs) - CAPABILITIES[kind])
    if not missing:
        return
    able = [other for other, has in CAPABILITIES.items() if set(needs) <= has]
    remedy = (
        f"choose engine.tier and engine.pipeline for one that can ({', '.join(able)}), or another method"
        if able
        else f"no engine is yet (known are {', '.join(get_args(Capability))}); choose another method"
    )
    raise ConfigError(
        f"{asker} needs an engine that is capable of {', '.join(missing)}, which {kind} is not: {remedy}"
    )

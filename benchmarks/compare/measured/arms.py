"""The ways to train that are compared, and the arguments that make them comparable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedspeed.config.load import load
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.errors import ConfigError
from fedspeed.federation.methods.config import METHODS

# Every arm trains the same adapter on the same rows in the same order: what a method's preset says about
# these is overridden by the configuration's own values.
SAME = (
    "adapter.method",
    "adapter.lora_rank",
    "adapter.alpha",
    "adapter.targets",
    "train.local_steps",
    "train.micro_batch",
    "train.accumulation",
    "train.clip",
    "train.schedule",
    "train.warmup_steps",
    "federation.rounds",
    "federation.round_budget",
    "federation.evaluate_every",
)
# So do all with the same mathematics take the same steps.
SAME_STEPS = ("train.optimizer", "train.lr", "train.weight_decay", "train.momentum")
SAME_SERVER = ("federation.server_optimizer", "federation.server_lr")
# Masks of dropout differ between executions; clients alone are another training.
ALWAYS = ("adapter.dropout=0", "federation.compare_alone=false")
PUBLIC = "federation.public_rows"  # of methods whose server trains on them; others refuse it
REFERENCE = "fedspeed"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        name: of the column. title: for people. settings: key=value arguments of its own.
        same_steps: whether the common optimizer and learning rate apply; without it the preset's do.
        public_rows: whether its server trains on rows that no client has.
        emulator: whether its rounds evaluate something else than the exported model, which is then evaluated.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    same_steps: bool = True
    public_rows: bool = False
    emulator: bool = False


def _method(name: str, title: str, *more: str, **facts: bool) -> Arm:
    return Arm(name=name, title=title, settings=(f"federation.method.name={name}", *more), **facts)


_OURS = ("federation.method.name=lora_average", "routing.mode=plain")
ARMS = {
    arm.name: arm
    for arm in (
        Arm(name=REFERENCE, title="FedSpeed", settings=(*_OURS, "engine.tier=resident")),
        Arm(
            name="fedspeed_ram",
            title="FedSpeed, base in RAM, least memory",
            settings=(*_OURS, "engine.tier=ram", "engine.activation_gib=0", "engine.logits_mib=8"),
        ),
        Arm(
            name="fedspeed_masked",
            title="FedSpeed, masked over relays",
            settings=("federation.method.name=lora_average", "routing.mode=mix+mask"),
        ),
        _method("fs_llm", "FederatedScope-LLM"),
        _method("fs_llm_offload", "FederatedScope-LLM, its ZeRO-3 offload"),
        _method("fate_llm", "FATE-LLM"),
        _method("fedbiot", "FedBiOT", public_rows=True, emulator=True),
        _method("m2fedsa", "M2FedSA"),
        _method("spry", "SPRY", same_steps=False),
        _method("spry_iteration", "SPRY, an exchange every step", same_steps=False),
        _method("fedavg_lora", "FedAvg-LoRA, checkpointed"),
        _method("zero3_offload", "stock ZeRO-3 offload"),
        _method("fedkseed", "FedKSeed", same_steps=False),
    )
}
DEFAULT = (
    REFERENCE,
    "fs_llm",
    "fate_llm",
    "fedbiot",
    "m2fedsa",
    "spry",
    "fedavg_lora",
    "zero3_offload",
    "fedspeed_ram",
)


def chosen(names: Sequence[str], more: Mapping[str, Sequence[str]]) -> list[Arm]:
    """Return the arms with these names, in this order. The first one is the reference of all ratios.

    Args:
        names: of ARMS, of methods, or of `more`. more: further settings by name; a name that is neither an
            arm nor a method begins with the settings of FedSpeed.

    Raises:
        ConfigError: a name is unknown, or given twice.
    """
    problems = [f"--methods: {name} is given twice" for name in set(names) if names.count(name) > 1]
    problems += [
        f"--set {name}: is not among --methods {','.join(names)}" for name in more if name not in names
    ]
    known = {*ARMS, *METHODS, *more}
    problems += [
        f"--methods: {name} is unknown; there are {', '.join(sorted({*ARMS, *METHODS}))}, and any name that "
        "--set gives settings to"
        for name in names
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    return [_with(name, more.get(name, ())) for name in names]


def _with(name: str, settings: Sequence[str]) -> Arm:
    if name in ARMS:
        arm = ARMS[name]
    elif name in METHODS:
        arm = _method(name, name)
    else:
        arm = Arm(name=name, title=name, settings=ARMS[REFERENCE].settings)
    return replace(arm, settings=merged(arm.settings, settings))


def merged(*groups: Sequence[str]) -> tuple[str, ...]:
    """Return key=value arguments without repeated keys: the last one of a key counts."""
    return tuple({text.partition("=")[0]: text for group in groups for text in group}.values())


def common_arguments(config: RunConfig, arm: Arm) -> tuple[str, ...]:
    """Return what an arm has in common with the others, as key=value arguments."""
    keys = SAME + (SAME_STEPS + SAME_SERVER if arm.same_steps else ())
    values = [f"{key}={flow(_value(config, key))}" for key in keys]
    return (*values, *ALWAYS)


def arguments_of(arm: Arm, path: Path, overrides: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return the arguments of a run of `launch.py` after its configuration.

    Args:
        path: of the configuration. overrides: of all arms.
    """
    own = [text for text in overrides if arm.public_rows or not text.startswith(f"{PUBLIC}=")]
    config = shared_config(path, overrides)
    return merged(own, common_arguments(config, arm), arm.settings, (f"run.seed={seed}",))


def shared_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration whose values all arms share."""
    shared = [text for text in overrides if not text.startswith((f"{PUBLIC}=", "federation.method."))]
    return load(path, shared).config


def _value(config: RunConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value

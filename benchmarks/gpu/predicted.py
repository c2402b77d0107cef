"""The planner's predictions of the measured steps. Only this module uses the planner."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.card import GIB
from benchmarks.gpu.link import PROBE_FILE
from benchmarks.gpu.shapes import Step
from fedspeed.cluster.hostfile import Host
from fedspeed.engine.config import EngineConfig
from fedspeed.models.families.shape import ModelShape
from fedspeed.planner.cards import card_of
from fedspeed.planner.fitting import fits, with_kept_activations
from fedspeed.planner.hardware import Node, node_of
from fedspeed.planner.memory import DRIVER_BYTES, FRAGMENTATION, device_memory
from fedspeed.planner.plan import RankProfile, Setting, Task
from fedspeed.planner.timing import seconds_of

DRY_CARD = "rtx3090"
CAP_SHARE = 0.9  # of a cap that a prediction may use, since predictions were never compared with this card


@dataclass(frozen=True)
class Prediction:
    """The prediction of a step: bytes on the device including fragmentation, seconds, and the setting."""

    nbytes: int
    seconds: float
    setting: Setting

    @property
    def result(self) -> dict:
        """Return the prediction as it is shown next to the measurement."""
        return {
            "predicted GiB": round(self.nbytes / GIB, 2),
            "predicted s": round(self.seconds, 4),
            "slots": self.setting.block_slots,
            "inputs": self.setting.block_inputs,
            "activations GiB": round(self.setting.activation_bytes / GIB, 2),
        }


def node(out: Path, dry: bool) -> Node | None:
    """Return the machine from this campaign's probe, or from published facts of its card; None: unknown."""
    if dry:
        return node_of(Host("localhost", 1, gpu=DRY_CARD))
    if (out / PROBE_FILE).is_file():
        return node_of(Host("localhost", 1), [json.loads((out / PROBE_FILE).read_text())])
    import torch

    found = card_of(torch.cuda.get_device_name())
    return node_of(Host("localhost", 1, gpu=found.name)) if found else None


def task_of(shape: ModelShape, step: Step) -> Task:
    """Return the task of one step of bf16 LoRA of one client."""
    return Task(shape, 1, step.tokens, step.rows * step.micro, step.rows, stage=2)


def profile_of(where: Node) -> RankProfile:
    """Return the profile of a single card."""
    return RankProfile(
        where, 1, 1, cluster_ranks=1, cluster_nodes=1, carried=1, participants=1, participants_here=1
    )


def predict(shape: ModelShape, step: Step, setting: Setting, where: Node) -> Prediction:
    """Predict a step in a setting."""
    task = task_of(shape, step)
    profile = profile_of(where)
    persistent, transient = device_memory(task, setting, profile, evaluation=False)
    nbytes = sum(persistent.values()) + int(sum(transient.values()) * (1 + FRAGMENTATION))
    return Prediction(nbytes, seconds_of(task, setting, profile).total, setting)


def setting_of(step: Step, slots: int, block_inputs: str = "device", tier: str = "ram") -> Setting:
    """Return a setting with so many slots that keeps no activations."""
    return Setting(tier, step.rows, step.micro, block_slots=slots, block_inputs=block_inputs)


def within(shape: ModelShape, step: Step, where: Node, cap_gib: float) -> Prediction:
    """Predict the fastest setting with the base in RAM under a cap, by the planner's models of memory and
    time.

    If not even two slots fit, the prediction is that of two slots.
    """
    capped = replace(
        where, device=replace(where.device, memory=int(CAP_SHARE * cap_gib * GIB) + DRIVER_BYTES)
    )
    task = task_of(shape, step)
    profile = profile_of(capped)
    settings = [
        setting_of(step, slots, block_inputs)
        for block_inputs in ("device", "host")
        for slots in range(2, shape.layers + 1)
    ]
    fitting = [
        with_kept_activations(task, setting, [profile])
        for setting in settings
        if fits(task, setting, profile)
    ]
    if not fitting:
        return predict(shape, step, setting_of(step, 2, "host"), where)
    return min((predict(shape, step, setting, where) for setting in fitting), key=lambda one: one.seconds)


def options_of(setting: Setting) -> EngineConfig:
    """Return the engine's configuration of a setting."""
    return EngineConfig(
        tier=setting.tier,
        block_slots=setting.block_slots,
        block_inputs=setting.block_inputs,
        activation_gib=setting.activation_bytes / GIB,
    )

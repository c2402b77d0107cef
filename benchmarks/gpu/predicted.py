"""What the planner says of a step before it is measured. The only module here that asks the planner."""

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
KEPT = 0.9  # part of a cap that a prediction may fill: none has met this card before


@dataclass(frozen=True)
class Prediction:
    """Of a step: bytes on the device with the allocator's fragments, seconds, and the setting."""

    nbytes: int
    seconds: float
    setting: Setting

    @property
    def result(self) -> dict:
        """As it stands beside what was measured."""
        return {
            "predicted GiB": round(self.nbytes / GIB, 2),
            "predicted s": round(self.seconds, 4),
            "slots": self.setting.block_slots,
            "inputs": self.setting.block_inputs,
            "activations GiB": round(self.setting.activation_bytes / GIB, 2),
        }


def node(out: Path, dry: bool) -> Node | None:
    """The machine: by the probe of this campaign, else by what is published of its card; None: unknown."""
    if dry:
        return node_of(Host("localhost", 1, gpu=DRY_CARD))
    if (out / PROBE_FILE).is_file():
        return node_of(Host("localhost", 1), [json.loads((out / PROBE_FILE).read_text())])
    import torch

    found = card_of(torch.cuda.get_device_name())
    return node_of(Host("localhost", 1, gpu=found.name)) if found else None


def task_of(shape: ModelShape, step: Step) -> Task:
    """One step of bf16 LoRA of one client."""
    return Task(shape, 1, step.tokens, step.rows * step.micro, step.rows, stage=2)


def profile_of(where: Node) -> RankProfile:
    """One card by itself."""
    return RankProfile(
        where, 1, 1, cluster_ranks=1, cluster_nodes=1, carried=1, participants=1, participants_here=1
    )


def predict(shape: ModelShape, step: Step, setting: Setting, where: Node) -> Prediction:
    """A step in a setting."""
    task = task_of(shape, step)
    place = profile_of(where)
    standing, moving = device_memory(task, setting, place, evaluation=False)
    nbytes = sum(standing.values()) + int(sum(moving.values()) * (1 + FRAGMENTATION))
    return Prediction(nbytes, seconds_of(task, setting, place).total, setting)


def setting_of(step: Step, slots: int, block_inputs: str = "device", tier: str = "ram") -> Setting:
    """A setting with so many slots that keeps no activations."""
    return Setting(tier, step.rows, step.micro, block_slots=slots, block_inputs=block_inputs)


def within(shape: ModelShape, step: Step, where: Node, cap_gib: float) -> Prediction:
    """The fastest setting with the base in RAM under a cap, by the planner's models of memory and time.

    Where not even two slots fit by the prediction, it is that of two slots.
    """
    capped = replace(where, device=replace(where.device, memory=int(KEPT * cap_gib * GIB) + DRIVER_BYTES))
    task = task_of(shape, step)
    place = profile_of(capped)
    settings = [
        setting_of(step, slots, block_inputs)
        for block_inputs in ("device", "host")
        for slots in range(2, shape.layers + 1)
    ]
    fitting = [
        with_kept_activations(task, setting, [place]) for setting in settings if fits(task, setting, place)
    ]
    if not fitting:
        return predict(shape, step, setting_of(step, 2, "host"), where)
    return min((predict(shape, step, setting, where) for setting in fitting), key=lambda one: one.seconds)


def options_of(setting: Setting) -> EngineConfig:
    """The engine's configuration of a setting."""
    return EngineConfig(
        tier=setting.tier,
        block_slots=setting.block_slots,
        block_inputs=setting.block_inputs,
        activation_gib=setting.activation_bytes / GIB,
    )

"""What the planner says of a step before it is measured. The only module here that asks the planner."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.card import GIB
from benchmarks.gpu.link import PROBE_FILE
from benchmarks.gpu.shapes import Step
from fedspeed.cluster.hostfile import Host
from fedspeed.models.catalogue import ModelShape
from fedspeed.planner.hardware import Node, card_of, node_of
from fedspeed.planner.memory import FRAGMENTS, device_memory
from fedspeed.planner.plan import Place, Setting, Task
from fedspeed.planner.timing import seconds_of

DRY_CARD = "rtx3090"
KEPT = 0.95  # part of a cap that a prediction may fill
LEAST_SLOTS = 4  # fewer than these, and block inputs wait in host memory


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
            "predicted inputs": self.setting.block_inputs,
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


def predict(shape: ModelShape, step: Step, setting: Setting, where: Node) -> Prediction:
    """One step of bf16 LoRA of one client on one card."""
    task = Task(shape, 1, step.tokens, step.rows * step.micro, stage=2)
    place = Place(where, 1, 1, 1, 1, 1, 1, 1)
    standing, moving = device_memory(task, setting, place, evaluation=False)
    nbytes = sum(standing.values()) + int(sum(moving.values()) * (1 + FRAGMENTS))
    return Prediction(nbytes, seconds_of(task, setting, place).total, setting)


def setting_of(step: Step, slots: int, block_inputs: str = "device", tier: str = "ram") -> Setting:
    """A setting with so many slots."""
    return Setting(tier, step.rows, step.micro, slots=slots, block_inputs=block_inputs)


def within(shape: ModelShape, step: Step, where: Node, cap_gib: float) -> Prediction:
    """The setting with the most slots under a cap; block inputs are on the device if that leaves a few.

    Where not even two slots fit by the prediction, it is that of two slots.
    """
    for block_inputs, least in (("device", LEAST_SLOTS), ("host", 2)):
        for slots in range(shape.layers, least - 1, -1):
            found = predict(shape, step, setting_of(step, slots, block_inputs), where)
            if found.nbytes <= KEPT * cap_gib * GIB:
                return found
    return predict(shape, step, setting_of(step, 2, "host"), where)


def with_slots(shape: ModelShape, step: Step, planned: Prediction, slots: int, where: Node) -> Prediction:
    """The same setting with another number of slots."""
    return predict(shape, step, replace(planned.setting, slots=slots), where)

"""The type of the fewest bits that all devices have: one rule for the planner, the dry run and the ranks."""

import pytest

from fedspeed.models.numeric_types import DeviceTypes, explanation, lowest_common
from fedspeed.planner.cards import CARDS
from fedspeed.planner.hardware import common_type, published_device


def gpu(name: str, *types: str) -> DeviceTypes:
    return DeviceTypes(name, "gpu", frozenset({"fp32", *types}))


NEW = gpu("ampere", "bf16", "fp16")
OLD = gpu("turing", "fp16")
ANCIENT = gpu("pascal")
CPU, FAST_CPU = (
    DeviceTypes(name, "cpu", frozenset({"fp32", *types}))
    for name, types in (("cpu", ()), ("amx", ("bf16", "fp16")))
)


@pytest.mark.parametrize(
    ("devices", "dtype", "whose"),
    [
        ([NEW], "bf16", "every GPU"),
        ([NEW, NEW], "bf16", "every GPU"),
        ([NEW, OLD], "fp16", "turing"),
        ([OLD], "fp16", "turing"),
        ([NEW, ANCIENT], "fp32", "pascal"),
        ([CPU], "fp32", "cpu"),
        ([FAST_CPU], "fp32", "amx"),
        ([NEW, CPU, OLD], "fp32", "cpu"),
    ],
)
def test_the_type_of_the_fewest_bits_that_all_have(devices, dtype, whose):
    assert lowest_common(devices) == lowest_common(devices[::-1]) == dtype
    said = explanation(dtype, devices)
    assert f"model.dtype={dtype} (auto: " in said and whose in said
    others = {"ampere", "turing", "pascal", "cpu", "amx"} - {whose}
    assert not [name for name in others if name in said]


def test_the_planner_asks_the_same_rule():
    for names in (["rtx3090"], ["rtx3090", "rtx2080ti"], ["v100", "t4"], ["h100", "a100"]):
        cards = [published_device(CARDS[name]) for name in names]
        assert common_type(cards, "auto") == lowest_common([
            DeviceTypes(c.name, c.kind, frozenset(c.flops)) for c in cards
        ])

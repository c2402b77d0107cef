"""The LoRA rank that a client's devices have memory for."""

from dataclasses import replace

import pytest

from fedspeed.models.catalogue import shape_of
from fedspeed.planner.client_ranks import halved, of_client_rank, rank_that_fits, shortage_of_smallest
from fedspeed.planner.fitting import fits
from fedspeed.planner.hardware import GIB
from fedspeed.planner.memory import memory_of
from fedspeed.planner.plan import Setting, Task
from tests.planner.cases import FIVE, one_profile

TASK = Task(shape_of(FIVE[0]), 2, rows=4, lora_rank=64, targets="all-linear", dtype="fp16")
SETTING = Setting("resident", 4, 1, block_slots=0, client_slots=2, block_inputs="device")


def chosen(profiles, task=TASK, setting=SETTING, block_inputs="auto", activation_gib="auto"):
    return rank_that_fits(task, setting, profiles, block_inputs=block_inputs, activation_gib=activation_gib)


def profile(gib, facts="gpu=rtx2080ti ram_gib=64", **options):
    """A rank whose device has so many GiB for it."""
    found = one_profile(facts, **options)
    device = replace(found.node.device, memory=int(gib * GIB))
    return replace(found, node=replace(found.node, device=device))


def test_ranks_are_halved():
    assert list(halved(16)) == [16, 8, 4, 2, 1] and list(halved(12)) == [12, 6, 3, 1]


def test_a_large_card_has_the_configured_rank_and_a_small_one_less():
    assert chosen([one_profile("gpu=rtx3090 ram_gib=64")]) == 64
    found = [chosen([profile(gib)]) or 0 for gib in (12, 8, 7, 6.5, 6)]
    assert found[:2] == [64, 64] and found[-1] == 0 and len(set(found)) == 4, found
    assert found == sorted(found, reverse=True), "more memory, no smaller rank"


def test_it_is_the_largest_that_fits_on_every_rank_of_the_client():
    small = profile(7)
    lora_rank = chosen([small])
    assert 1 <= lora_rank < 64 and chosen([profile(12), small]) == lora_rank
    host = replace(SETTING, block_inputs="host")
    assert fits(of_client_rank(TASK, lora_rank), host, small)
    assert not fits(of_client_rank(TASK, 2 * lora_rank), host, small)


def test_what_a_small_client_does_not_train_is_counted_as_frozen():
    """It takes a tenth of what it would take trained, but it is there."""
    place = profile(12)
    sizes = {r: memory_of(of_client_rank(TASK, r), SETTING, place).gpu_bytes for r in (64, 32)}
    alone = memory_of(replace(TASK, lora_rank=32), SETTING, place).gpu_bytes
    frozen = TASK.shape.folded(TASK.targets, 32) * 2
    assert alone < sizes[32] == pytest.approx(alone + frozen, abs=0.1 * frozen) and sizes[32] < sizes[64]


def test_settings_that_are_configured_are_kept():
    """A budget of activations, or inputs that must stay on the device, leave less for the adapter."""
    card = [profile(6.5)]
    assert chosen(card, block_inputs="device") < chosen(card)
    card = [profile(8)]
    assert chosen(card, activation_gib=0.4, block_inputs="host") < chosen(card)


def test_the_shortage_is_described_with_numbers():
    text = shortage_of_smallest(TASK, SETTING, [profile(2)])
    assert "GiB of GPU memory needed, 2.0 available (on rtx2080ti)" in text

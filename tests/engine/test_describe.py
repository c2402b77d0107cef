"""How an execution is described, and which settings it does not read."""

import dataclasses

import pytest

from fedspeed.engine.base.describe import _KEYS, _READ, unused_settings
from fedspeed.engine.config import EngineConfig
from tests.tiny import run_config

EVERY = {
    "client_slots": 1,
    "block_slots": 3,
    "resident_blocks": 1,
    "base_reads": "one_sided",
    "block_inputs": "host",
    "activation_gib": 1.0,
    "compile_blocks": True,
    "activation_checkpointing": True,
}


@pytest.mark.parametrize(
    ("tier", "names"),
    [
        (
            "stock",
            "client_slots block_slots resident_blocks base_reads block_inputs activation_gib compile_blocks",
        ),
        ("resident", "block_slots resident_blocks base_reads activation_checkpointing"),
        ("nf4", "base_reads activation_checkpointing"),
        ("ram", "base_reads activation_checkpointing"),
        ("cluster", "activation_checkpointing"),
    ],
)
def test_a_setting_that_is_not_read_is_reported(tier, names):
    unused = unused_settings(run_config(engine={"tier": tier, **EVERY}), {})
    assert [line.partition("=")[0] for line in unused] == [f"engine.{name}" for name in names.split()]
    assert all(" changes nothing in this run: " in line for line in unused)


def test_nothing_is_unused_of_defaults_and_a_budget_says_how_many_slots():
    for tier in _READ:
        assert unused_settings(run_config(engine={"tier": tier}), {}) == []
    [line] = unused_settings(run_config(engine={"tier": "ram", "base_gib": 1.0, "block_slots": 5}), {})
    assert line.startswith("engine.block_slots=5 changes nothing")
    assert (
        unused_settings(run_config(engine={"pipeline": "client", "tier": "ram", "block_slots": 4}), {}) == []
    )
    [line] = unused_settings(run_config(engine={"pipeline": "client", "block_slots": 4}), {})
    assert line.endswith("a pipeline over each client's ranks, whose parts of the base stay on their devices")


def test_every_key_is_one_of_the_engine():
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    assert set(_KEYS) <= fields
    assert set().union(*_READ.values()) == set(_KEYS)

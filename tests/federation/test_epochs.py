"""Rounds of one epoch: how many steps, together with whom, at which rate, and what they exclude."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import topology_of
from fedspeed.config.check import conflicts
from fedspeed.data.batches import epoch_steps, step_rows
from fedspeed.data.clients import ClientData
from fedspeed.data.config import MAX_STEPS
from fedspeed.federation.checks import epoch_problem, step_problem
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.federation.methods.config import METHODS
from fedspeed.federation.methods.turns import ALONE, Turn
from fedspeed.federation.round_header import limits_of
from fedspeed.federation.schedule import lr_in_run
from fedspeed.federation.trainer import simultaneous_turns
from fedspeed.session.needs import step_lines
from tests.tiny import run_config


def turns(steps, round=1):
    """Return turns of clients 0, 1, ... of these numbers of steps."""
    return [
        Turn(client=i, round=round, start={}, frozen=frozenset(), steps=count, seed=0, memory={})
        for i, count in enumerate(steps)
    ]


def groups(steps, slots, round=1):
    return [[turn.client for turn in group] for group in simultaneous_turns(turns(steps, round), slots)]


@pytest.mark.parametrize(("rows", "per_step"), [(1, 4), (8, 4), (9, 4), (23, 5)])
def test_an_epoch_has_every_row(rows, per_step):
    steps = epoch_steps(rows, per_step)
    seen = [row for step in range(steps) for row in step_rows(3, 1, step, per_step, rows)]
    assert set(seen[:rows]) == set(range(rows)) and len(seen) - rows < per_step


def test_the_longest_turns_are_trained_first_and_together():
    assert groups([3, 7, 5, 7], slots=2) == [[1, 3], [2, 0]]
    assert groups([4, 4, 4], slots=2) == [[0, 1], [2]], "equal turns stay in their order"
    assert groups([3, 7, 5, 7], slots=1) == [[1], [3], [2], [0]]
    assert groups([], slots=2) == []


def test_clients_alone_share_a_slot_schedule_only_if_they_are_equally_long():
    assert groups([6, 14, 6, 14], slots=3, round=ALONE) == [[1, 3], [0, 2]]


def epochs(method="lora_average", **sections):
    """A configuration of four rounds of an epoch each."""
    federation = {"round_budget": "epoch", "rounds": 4, "method": {"name": method}}
    sections["train"] = {"lr": 1.0, "schedule": "linear"} | sections.get("train", {})
    return run_config(model={"base": "m"}, federation=federation, **sections)


def test_the_rate_is_that_of_the_round_for_all_clients():
    """Whatever the length of an epoch, also where a client trains alone for all of them."""
    for steps in (1, 3, 10):
        rates = [lr_in_run(epochs(), step, steps) for step in range(4 * steps)]
        assert rates == [rate for rate in (1.0, 0.75, 0.5, 0.25) for _ in range(steps)]
    by_steps = replace(epochs(), federation=replace(epochs().federation, round_budget="steps"))
    assert lr_in_run(by_steps, 5, 2) == 1.0 - 5 / 8


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("train.local_steps_by_cluster", {"train": {"local_steps_by_cluster": {"fast": 3}}}),
        ("train.warmup_steps", {"train": {"warmup_steps": 5}}),
        ("engine.pipeline", {"engine": {"pipeline": "cluster"}}),
    ],
)
def test_what_epochs_are_not_combined_with(key, sections):
    (found,) = [one for one in conflicts(epochs(**sections)) if "federation.round_budget" in one.keys]
    assert found.keys == (key, "federation.round_budget")
    assert found.text.startswith(f"{key}=") and found.text.endswith("leave one of them out")
    assert not [one for one in conflicts(epochs()) if "federation.round_budget" in one.keys]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_trains_in_its_own_way_says_that_it_takes_unequal_turns(name):
    method = method_class(name)
    problem = epoch_problem(epochs(name), method)
    assert bool(problem) == (method.train is not Method.train and not method.unequal_turns)
    assert epoch_problem(run_config(), method) == ""


def test_fedkseed_trains_equal_turns_only():
    problem = epoch_problem(epochs("fedkseed"), method_class("fedkseed"))
    assert "federation.round_budget=epoch" in problem and "federation.method=fedkseed" in problem


def test_steps_that_all_take_together_are_no_epochs():
    method = SimpleNamespace(exchange_every="step")
    assert "federation.round_budget=epoch" in step_problem(epochs(), method)


def test_a_masked_header_allows_any_epoch():
    """Nobody knows how many rows another participant has, so that only the general limit holds."""
    components = SimpleNamespace(config=epochs(), role=SimpleNamespace(ranks=3))
    assert limits_of(components).steps == MAX_STEPS


def test_a_dry_run_says_how_long_an_epoch_is():
    """Rows are divided over the ranks of a client."""
    config = epochs(data={"clients": 2}, train={"micro_batch": 4})
    data = [ClientData([None] * rows, [], pad_id=0) for rows in (24, 30)]
    for slots, text in ((1, "6 to 8"), (2, "3 to 4")):
        topology = topology_of(config, (Host("a", slots), Host("b", slots)))
        if slots == 2:
            topology = topology_of(
                replace(config, cluster=replace(config.cluster, ranks_per_client=2)),
                (Host("a", slots), Host("b", slots)),
            )
        [line] = step_lines(config, topology, data)
        assert line == f"steps    an epoch takes a client {text} local steps"
    assert step_lines(run_config(), topology, data) == []

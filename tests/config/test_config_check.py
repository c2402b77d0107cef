"""Rules between sections."""

import dataclasses

import pytest

from fedspeed.config.check import problems
from fedspeed.config.run import RunConfig


def config(**sections) -> RunConfig:
    """RunConfig with a base, and the given values: section={field: value}."""
    run = RunConfig()
    sections = {"model": {"base": "m"}, **sections}
    return dataclasses.replace(run, **{
        name: values if name == "deepspeed" else dataclasses.replace(getattr(run, name), **values) for name, values in sections.items()})


def test_defaults_lack_only_a_model():
    assert problems(config()) == []
    assert [p.partition(" ")[0] for p in problems(RunConfig())] == ["model.base"]


@pytest.mark.parametrize(("sections", "said"), [
    ({"adapter": {"method": "full"}, "federation": {"aggregation": "svd"}},
     "federation.aggregation=svd works on LoRA factors, but adapter.method is full"),
    ({"adapter": {"method": "full"}, "federation": {"aggregation": "freeze_a"}}, "federation.aggregation=freeze_a works on LoRA factors"),
    ({"adapter": {"method": "full"}, "federation": {"aggregation": "alternate"}}, "federation.aggregation=alternate works on LoRA factors"),
    ({"adapter": {"method": "full", "start_from": "runs/x"}}, "adapter.start_from=runs/x is a PEFT adapter, but adapter.method is full"),
    ({"adapter": {"targets": ""}}, "adapter.targets is ''"),
    ({"adapter": {"targets": "q_proj,,v_proj"}}, "adapter.targets is 'q_proj,,v_proj'"),
    ({"train": {"momentum": 0.9}}, "train.momentum=0.9 is for sgd, but train.optimizer is adamw"),
    ({"train": {"local_steps_by_cluster": "fast=3"}}, "train.local_steps_by_cluster: 'fast=3' is not of the form name:steps"),
    ({"train": {"local_steps_by_cluster": "fast:0"}}, "'fast:0' is not of the form name:steps with at least 1 step"),
    ({"train": {"local_steps_by_cluster": "a:1,"}}, "'' is not of the form name:steps"),
    ({"train": {"local_steps_by_cluster": "a:1,a:2"}}, "cluster 'a' stands there twice"),
    ({"federation": {"clients_per_round": 4}}, "federation.clients_per_round=4 of data.clients=3"),
    ({"data": {"task": "file"}}, "data.task=file needs data.path"),
    ({"cluster": {"ranks_per_client": "two"}}, "cluster.ranks_per_client is 'two'; write auto or a whole number"),
    ({"cluster": {"local_ranks": "0"}}, "cluster.local_ranks is '0'"),
    ({"run": {"name": "../x"}}, "run.name is '../x'"),
    ({"run": {"name": ".."}}, "run.name is '..'"),
    ({"deepspeed": {"fp16": {"enabled": True}}}, "deepspeed.fp16.enabled is true, but model.dtype is bf16"),
    ({"deepspeed": {"bf16": {"enabled": False}}}, "deepspeed.bf16.enabled is false, but model.dtype is bf16"),
])
def test_each_rule(sections, said):
    found = problems(config(**sections))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize("sections", [
    {"adapter": {"method": "lora"}, "federation": {"aggregation": "svd"}},
    {"adapter": {"method": "full"}, "federation": {"aggregation": "avg_factors"}},
    {"adapter": {"start_from": "runs/x"}},
    {"train": {"momentum": 0.9, "optimizer": "sgd"}},
    {"train": {"local_steps_by_cluster": "fast:3,slow:1"}},
    {"federation": {"clients_per_round": 3}},
    {"data": {"task": "file", "path": "rows.jsonl"}},
    {"cluster": {"ranks_per_client": "2", "local_ranks": "1"}},
    {"deepspeed": {"base": "zero3.json", "bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}},
])
def test_what_goes_together(sections):
    assert problems(config(**sections)) == []

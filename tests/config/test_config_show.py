"""--print-config, the journal's copy, and the fingerprint."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspeed.config.deepspeed import merge
from fedspeed.config.deepspeed_rules import leaves
from fedspeed.config.load import FIELDS, load
from fedspeed.config.run import RunConfig
from fedspeed.config.show import as_dict, fingerprint, render

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.yaml"))


def shown(path: Path | None, *overrides: str) -> tuple:
    loaded = load(path, overrides)
    return loaded, render(loaded, merge(loaded.config.deepspeed, loaded.config, loaded.folder))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_printed_loads_back_from_anywhere(path, tmp_path):
    loaded, text = shown(path, "train.lr=1e-5", "run.name=no")
    copy = tmp_path / "copy.yaml"
    copy.write_text(text, encoding="utf-8")
    again, text_again = shown(copy)
    assert again.config == loaded.config
    assert fingerprint(again.config) == fingerprint(loaded.config)
    assert [line.partition("  #")[0] for line in text_again.splitlines()] == [
        line.partition("  #")[0] for line in text.splitlines()
    ]


def test_it_is_yaml_for_other_readers_too():
    loaded, text = shown(
        ROOT / "ds_configs" / "gsm8k.yaml",
        "train.lr=1e-5",
        "run.name=no",
        "data.path=1e-3",
        "cluster.local_ranks=2",
    )
    assert yaml.safe_load(text) == as_dict(loaded.config)


def test_every_value_has_its_source():
    loaded, text = shown(None, "model.base=m", "deepspeed.wall_clock_breakdown=true")
    values = len(list(leaves(as_dict(loaded.config))))
    lines = [line for line in text.partition("\n\n")[0].splitlines() if "  # " in line]
    assert len(lines) == values > len(FIELDS)
    assert sum(line.endswith("# command line") for line in lines) == 2
    assert sum("# default" in line for line in lines) == values - 2
    assert len({line.index("  # ") for line in lines}) == 1  # aligned


def test_the_resolved_section_says_who_decided():
    _, text = shown(ROOT / "ds_configs" / "gsm8k.yaml", "deepspeed.zero_optimization.overlap_comm=false")
    resolved = {
        line.split(":")[0].strip("# "): line
        for line in text.partition("# What DeepSpeed receives")[2].splitlines()[1:]
    }
    for key, value, origin in [
        ("train_micro_batch_size_per_gpu", "4", "train.micro_batch"),
        ("stage", "3", "zero3.json"),
        ("overlap_comm", "false", "command line"),
        ("reduce_bucket_size", "auto", "engine"),
        ("zero_allow_untested_optimizer", "true", "FedSpeed"),
        ("steps_per_print", "null", "FedSpeed"),
    ]:
        assert resolved[key].split(": ")[1].split() == [value, "#", *origin.split()], resolved[key]
    assert resolved["initial_scale_power"].endswith("gsm8k.yaml:42")


def test_an_empty_deepspeed_section_is_shown():
    loaded, text = shown(None, "model.base=m")
    assert "deepspeed: {}" in text and load(None, ["model.base=m"]).config == loaded.config


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12)
SCALARS = st.integers(-9, 9) | st.booleans() | TEXTS


@settings(database=None, max_examples=60)
@given(
    name=NAMES.filter(lambda name: "/" not in name and name not in (".", "..")),
    lr=st.floats(0, 1e30),
    value=st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=4),
)
def test_any_text_and_number_survives_printing(tmp_path_factory, name, lr, value):
    loaded = load(None, ["model.base=m"])
    config = dataclasses.replace(
        loaded.config,
        run=dataclasses.replace(loaded.config.run, name=name),
        train=dataclasses.replace(loaded.config.train, lr=lr),
        deepspeed={"timers": {"throughput": value}},
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(render(dataclasses.replace(loaded, config=config), {}), encoding="utf-8")
    assert load(path).config == config


def test_as_dict_is_a_copy():
    config = load(None, ["model.base=m", "deepspeed.aio.block_size=1"]).config
    values = as_dict(config)
    values["deepspeed"]["aio"]["block_size"] = 2
    assert config.deepspeed["aio"]["block_size"] == 1
    assert values["train"]["lr"] == config.train.lr


@pytest.mark.parametrize(
    "override",
    [
        "run.name=x",
        "run.out=x",
        "monitor.plot=false",
        "checkpoint.keep=9",
        "routing.deadline_s=9",
        "cluster.start_timeout_s=9",
        "cluster.heartbeat_timeout_s=9",
        "cluster.max_restarts=9",
        "federation.rounds=99",
        "federation.patience=9",
        "engine.block_slots=3",
        "engine.activation_gib=0",
        "engine.block_inputs=host",
        "engine.base_gib=1",
    ],
)
def test_fingerprint_passes_over_what_does_not_change_the_arithmetic(override):
    assert fingerprint(load(None, ["model.base=m", override]).config) == fingerprint(
        load(None, ["model.base=m"]).config
    )


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "model.base=n",
        "train.lr=0.5",
        "data.clients=4",
        "adapter.lora_rank=2",
        "federation.method=flexlora",
        ("federation.method=flexlora", "adapter.rank_by_client={0: 2}"),
        "federation.method.rule=freeze_a",
        "train.local_steps_by_cluster={a: 2}",
        "adapter.targets=[q_proj]",
        "adapter.blocks.last=1",
        "federation.updates=[clip]",
        "cluster.ranks_per_client=1",
        "engine.base_partition=rank",
        "engine.matmul=tf32",
        "engine.resident_blocks=1",  # keeps a block from being rounded where the tier is int8 or nf4
        "engine.deterministic=true",
        "deepspeed.zero_optimization.stage=1",
        "routing.transport=mpi",
    ],
)
def test_fingerprint_sees_the_rest(override):
    *others, override = [override] if isinstance(override, str) else override
    assert fingerprint(load(None, ["model.base=m", *others, override]).config) != fingerprint(
        load(None, ["model.base=m", *others]).config
    )


@pytest.mark.parametrize(
    ("optimizer", "number"), [("none", "1.0"), ("momentum", "1.0"), ("adam", "0.01"), ("yogi", "0.01")]
)
def test_auto_step_of_the_server_is_shown_and_counts_as_what_it_comes_to(optimizer, number):
    words = ("model.base=m", f"federation.server_optimizer={optimizer}")
    loaded, text = shown(None, *words)
    line = next(line for line in text.splitlines() if "server_lr" in line)
    assert line.split("#")[0].split() == ["server_lr:", "auto"] and f"comes to {float(number):g}" in line
    assert loaded.config.federation.server_step == float(number)
    given, other = (load(None, [*words, f"federation.server_lr={value}"]).config for value in (number, "0.5"))
    assert fingerprint(given) == fingerprint(loaded.config) != fingerprint(other)
    assert "comes to" not in shown(None, *words, "federation.server_lr=0.5")[1]


def test_fingerprint_is_a_sha256_that_ignores_the_order_of_keys():
    config = load(None, ["model.base=m"]).config
    assert len(fingerprint(config)) == 64 and int(fingerprint(config), 16)
    one, other = (
        dataclasses.replace(config, deepspeed=section) for section in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    )
    assert fingerprint(one) == fingerprint(other)


def test_runs_of_earlier_versions_go_on():
    """With the defaults of keys that they did not have, the fingerprint is what it was then."""
    assert fingerprint(RunConfig()) == "acedda8c233633b892e786f5c8957c7fe355ff4b0e500e2c9dc4ef6ca905fe5d"

"""What is held against a method before anything starts, and whom its models are evaluated for."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.engine.capabilities import CAPABILITIES
from fedspeed.errors import ConfigError, DataError
from fedspeed.federation import checks
from fedspeed.federation.checks import check_method
from fedspeed.federation.methods.base import method_class
from fedspeed.federation.methods.config import METHODS, Entry, variant_of
from fedspeed.session import participant
from fedspeed.session.engine_spec import FIXED, engine_spec
from fedspeed.session.site import Site
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.tiny import run_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 260,
}


def configured(method, **sections):
    config = run_config(**sections)
    return replace(config, federation=replace(config.federation, method=variant_of(method)()))


def spoken(count):
    """As many clients as participants."""
    return {client: client for client in range(count)}


@pytest.fixture
def others(monkeypatch):
    entry = Entry(module="tests.federation.methods.every_step", sums_only=True)
    monkeypatch.setitem(METHODS, "every_step", entry)


@pytest.mark.parametrize("method", METHODS)
def test_in_the_clear_every_method_is_allowed(method):
    """With the kind of engine that it needs."""
    kind = "split" if "split" in method_class(method).needs else "stock"
    check_method(configured(method, routing={"mode": "plain"}), spoken(2), kind)


def test_masked_modes_take_what_needs_sums_of_enough():
    masked = {"mode": "mix+mask", "min_participants": 4}
    check_method(configured("lora_average", routing=masked), spoken(4), "stock")
    assert checks.least_participants(configured("lora_average", routing=masked), spoken(9)) == 4
    with pytest.raises(
        ConfigError, match="only 3 of 3 participants may contribute .*routing.min_participants=4; add"
    ):
        check_method(configured("lora_average", routing=masked), spoken(3), "stock")
    for method in ("flexlora", "stack", "residual"):
        with pytest.raises(
            ConfigError, match=f"federation.method={method}: only 1 of 9 participants may contribute"
        ):
            check_method(configured(method, routing=masked), spoken(9), "stock")


def test_masked_modes_take_directions_that_all_clients_draw():
    masked = {"mode": "mask", "min_participants": 3}
    own = configured("fedkseed", routing=masked)
    with pytest.raises(ConfigError, match="fedkseed: only 1 of 3 participants may contribute"):
        check_method(own, spoken(3), "stock")
    method = replace(own.federation.method, draws="common")
    check_method(replace(own, federation=replace(own.federation, method=method)), spoken(3), "stock")


@pytest.fixture
def slices(monkeypatch, tmp_path):
    """A method that deals modules to the clients in turn; gives a masked configuration of it, on a base of
    two blocks with two adapted matrices each.
    """
    from fedspeed.federation.methods.lora_average.method import LoraAverage

    def min_holders(cls, config, participants, modules):
        dealt = [{participants[c] for c in participants if c % modules == unit} for unit in range(modules)]
        return min(map(len, dealt))

    monkeypatch.setattr(LoraAverage, "min_holders", classmethod(min_holders))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return configured(
        "lora_average",
        model={"base": str(tmp_path), "init": "random", "tokenizer": "bytes"},
        adapter={"targets": ("q_proj", "v_proj")},
        routing={"mode": "mask", "min_participants": 3},
    )


def test_a_slice_of_few_participants_is_no_sum(slices):
    check_method(slices, spoken(12), "stock")
    with pytest.raises(ConfigError, match="only 2 of 11 participants may contribute"):
        check_method(slices, spoken(11), "stock")


def test_a_sum_goes_on_without_those_only_whose_loss_leaves_enough_in_every_slice(slices):
    """Of twelve participants three each share a slice: none may be lost, of sixteen one."""
    assert checks.least_participants(slices, spoken(12)) == 12
    assert checks.least_participants(slices, spoken(16)) == 15


def test_a_slice_of_one_gateway_is_that_gateways_alone(slices):
    """Twelve clients on four gateways: clients 0, 4 and 8 share module 0, and all have gateway 0."""
    with pytest.raises(ConfigError, match="only 1 of 4 participants may contribute"):
        check_method(slices, {client: client % 4 for client in range(12)}, "stock")


def test_who_speaks_for_whom():
    topology = SimpleNamespace(gateways=(0, 0, 2))
    config = run_config()
    assert checks.participants_of(config, topology, 2) == {0: 0, 1: 0, 2: 2}
    sites = run_config(routing={"transport": "tls"})
    assert checks.participants_of(sites, topology, 3) == spoken(3)


@pytest.mark.parametrize("name", ["scaffold", "fedsa"])
def test_memory_of_clients_is_kept_where_only_they_can_read_it(name):
    with pytest.raises(ConfigError, match=f"{name} keeps clients' own arrays in the run's folder"):
        check_method(configured(name, routing={"mode": "mask"}), spoken(5), "stock")
    check_method(configured(name, routing={"mode": "mask", "transport": "tls"}), spoken(5), "stock")
    check_method(configured(name, routing={"mode": "plain"}), spoken(5), "stock")


def test_a_server_that_trains_with_clients_knows_one_number_of_steps():
    """With that of its own cluster, its learning rates would be those of other steps."""
    train = {"local_steps_by_cluster": {"slow": 2}}
    with pytest.raises(
        ConfigError, match="slow: 2.*federation.method=m2fedsa .*leave train.local_steps_by_c"
    ):
        check_method(configured("m2fedsa", train=train, routing={"mode": "plain"}), spoken(2), "split")
    check_method(configured("fedbiot", train=train, routing={"mode": "plain"}), spoken(2), "streamed")


@pytest.mark.parametrize(
    ("sections", "setting"),
    [
        ({"federation": {"staleness": 1}}, "federation.staleness=1"),
        (
            {"federation": {"round_budget": "seconds", "round_seconds": 3.0}},
            "federation.round_budget=seconds",
        ),
        ({"train": {"local_steps_by_cluster": {"slow": 2}}}, "train.local_steps_by_cluster"),
        ({"federation": {"compare_alone": True}}, "federation.compare_alone=true"),
    ],
)
def test_an_exchange_in_every_step_is_taken_by_all_together(others, sections, setting):
    with pytest.raises(
        ConfigError,
        match=f"every_step exchanges updates in every local step.* cannot be combined with {setting}",
    ):
        check_method(configured("every_step", routing={"mode": "plain"}, **sections), spoken(3), "stock")
    check_method(configured("every_step", routing={"mode": "plain"}), spoken(3), "stock")


def test_all_problems_of_a_method_is_reported_at_once(others, monkeypatch):
    monkeypatch.setitem(CAPABILITIES, "stock", frozenset({"perturb"}))
    config = configured(
        "every_step", routing={"mode": "mask", "min_participants": 5}, federation={"staleness": 1}
    )
    with pytest.raises(
        ConfigError, match="only 3 of 3 participants .*; .*staleness=1; .*capable of gradients"
    ):
        check_method(config, spoken(3), "stock")


def test_what_a_server_needs_is_held_against_its_own_engine(monkeypatch):
    from fedspeed.federation.methods.lora_average.method import LoraAverage

    monkeypatch.setattr(LoraAverage, "server_needs", frozenset({"generate"}))
    monkeypatch.setitem(CAPABILITIES, "streamed", frozenset({"gradients"}))
    config = configured("lora_average", routing={"mode": "plain"})
    check_method(config, 2, "streamed")
    check_method(config, 2, "streamed", "stock")
    with pytest.raises(
        ConfigError,
        match="the server of federation.method=lora_average needs an engine .* generate, which streamed",
    ):
        check_method(config, 2, "stock", "streamed")


def test_checks_load_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {checks.__name__}; sys.exit('torch' in sys.modules)"],
        cwd=ROOT,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0


def test_a_client_is_evaluated_by_its_own_model_if_it_has_one():
    from fedspeed.federation.named_models import assigned_models

    common, own = ({"w": np.full(1, value)} for value in (0.0, 1.0))
    assert assigned_models({"adapter": common}, (0, 2)) == [(common, [0, 2])]
    assert assigned_models({"adapter": common, "client-2": own, "full": own}, (0, 2)) == [
        (common, [0]),
        (own, [2]),
    ]
    assert assigned_models({"client-2": own}, (2,)) == [(own, [2])]
    assert assigned_models({"adapter": common}, ()) == []


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("client-0",), "no 'adapter'"),
        (("adapter", "Full"), "'Full'"),
        (("adapter", "a/b"), "'a/b'"),
        (("adapter", "client-0-last"), "last"),
    ],
)
def test_models_have_names_that_folders_can_have(names, what):
    from fedspeed.federation.named_models import models_of

    method = type("Odd", (), {"models": lambda self, state, memory: dict.fromkeys(names, state)})()
    with pytest.raises(ValueError, match=f"Odd.models .*{what}"):
        models_of(method, {}, {})


@pytest.mark.parametrize("name", FIXED)
def test_a_method_builds_nothing_that_others_decide_by(name, monkeypatch, tmp_path):
    """Which blocks there are and how they are executed is the engine's alone; how many rows a step has,
    not.
    """
    from fedspeed.federation.methods.lora_average.method import LoraAverage

    def changed(cls, config, spec, *, shape):
        section, _, field = name.rpartition(".")
        if not section:
            return replace(spec, **{field: "other"})
        return replace(spec, **{section: replace(getattr(spec, section), **{field: "other"})})

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config = configured("lora_average", model={"base": str(tmp_path), "init": "random", "tokenizer": "bytes"})
    monkeypatch.setattr(
        LoraAverage, "spec", classmethod(lambda cls, config, spec, *, shape: replace(spec, blocks=(0,)))
    )
    assert engine_spec(config, {}, "client").blocks == (0,)
    monkeypatch.setattr(LoraAverage, "spec", classmethod(changed))
    with pytest.raises(
        ValueError, match=f"federation.method=lora_average would build an engine with {name}=other"
    ):
        engine_spec(config, {}, "client")


def test_an_exchange_of_slices_asks_for_as_many_as_its_fewest_need(slices, monkeypatch):
    """What `session.participant.make_anonymous_exchange` gives to the anonymous exchange."""
    from fedspeed.routing.anonymous import exchange

    monkeypatch.setattr(exchange, "AnonymousExchange", lambda transport, routing, *_, **__: routing)
    topology = SimpleNamespace(gateways=tuple(range(16)), server=())
    job = SimpleNamespace(
        is_participant=True,
        config=slices,
        outlives_losses=True,
        topology=topology,
        request=SimpleNamespace(deepspeed={}, folder=None),
        deployment=SimpleNamespace(settled_marks=lambda folder: None),
    )
    own = SimpleNamespace(key=None, members=None, settings=None, names=())
    assert (
        participant.make_anonymous_exchange(job, SimpleNamespace(size=16), own, None).min_participants == 15
    )


@pytest.mark.parametrize(
    ("weight", "sections", "is_refused"),
    [
        (100.0, {"routing": {"mode": "mask", "max_weight": 100.0}}, False),
        (101.0, {"routing": {"mode": "mask", "max_weight": 100.0}}, True),
        (101.0, {"routing": {"mode": "plain", "max_weight": 100.0}}, False),
        (1e7, {"routing": {"mode": "mask"}}, False),
    ],
)
def test_a_weight_above_the_public_bound_is_refused_before_the_start(weight, sections, is_refused):
    config = run_config(**sections)
    if not is_refused:
        checks.check_weight(config, weight)
        return
    with pytest.raises(DataError) as caught:
        checks.check_weight(config, weight)
    assert str(caught.value) == (
        "data.task=builtin: the training rows of this participant's clients have 101 answer tokens, and "
        "routing.max_weight=100 is the most that one participant may have; raise routing.max_weight on all "
        "sites, or use fewer rows (data.max_rows)"
    )


def test_sites_compare_the_public_bounds():
    """Of a weight, and of a client's delta: nobody can check another's, so all must mean the same."""
    config = run_config(
        model={"base": "elsewhere/base", "init": "random"},
        routing={"mode": "mask", "max_weight": 77.0, "roster_signer": "00" * 32},
        federation={"updates": [{"name": "clip", "norm": 0.5}]},
    )
    shared = Site.settings.func(SimpleNamespace(config=config))
    assert shared["routing.max_weight"] == "77.0"
    assert json.loads(shared["federation.updates"]) == [{"name": "clip", "norm": 0.5}]


def test_modules_are_those_of_the_engine_that_a_method_builds(slices):
    spec = engine_spec(slices, {}, "client")
    assert checks.adapted_modules(slices, spec) == checks.adapted_modules(slices) == 4
    assert checks.adapted_modules(slices, replace(spec, blocks=(1,))) == 2
    assert (
        checks.adapted_modules(slices, replace(spec, adapter=replace(spec.adapter, targets=("q_proj",)))) == 2
    )

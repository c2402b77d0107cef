"""Rules between a method and the clients' local training."""

import pytest

from fedspeed.config.check import problems
from tests.tiny import run_config

SGD = {"optimizer": "sgd"}


def found(name, sections, **options):
    """Return the problems of a configuration with a method."""
    federation = {**sections.get("federation", {}), "method": {"name": name, **options}}
    model = {"base": "m", **sections.get("model", {})}
    return problems(run_config(**{"train": SGD, **sections, "federation": federation, "model": model}))


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("fedprox", {"train": {}}),
        ("fedprox", {"train": {"clip": 1.0}, "adapter": {"method": "full"}}),
        ("scaffold", {"train": SGD | {"weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3}}),
        ("scaffold", {"adapter": {"method": "full"}, "federation": {"staleness": 1, "server_lr": 0.5}}),
        ("fedsa", {"train": {}, "federation": {"server_optimizer": "yogi", "local_optimizer": "keep"}}),
        ("fedkseed", {"train": SGD | {"schedule": "linear"}, "adapter": {"method": "full"}}),
        ("fedkseed", {"federation": {"server_optimizer": "momentum"}}),
    ],
)
def test_what_a_method_can_be_combined_with(name, sections):
    assert found(name, sections) == []


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [("optimizer", "adamw", "sgd, with a larger lr"), ("momentum", 0.5, "0"), ("clip", 1.0, "0")],
)
def test_a_control_variate_needs_steps_along_gradients(key, value, remedy):
    (text,) = found("scaffold", {"train": SGD | {key: value}})
    assert f"but train.{key}={value} " in text and f"; set train.{key}={remedy}, or choose another" in text


def test_what_a_control_variate_needs_besides():
    (text,) = found("scaffold", {"train": SGD | {"lr": 0.0}})
    assert "divides the change of weights by train.lr, which is 0" in text
    (text,) = found("scaffold", {"federation": {"updates": ({"name": "clip"},)}})
    assert "federation.updates (clip) changes what clients send" in text
    sites = {"routing": {"transport": "tls"}, "model": {"dtype": "fp32"}}
    assert found("scaffold", sites | {"data": {"clients": 1}}) == []
    (text,) = found("scaffold", sites | {"data": {"clients": 2}})
    assert "knows its own data.clients=2 only; set data.clients=1" in text


@pytest.mark.parametrize(
    ("section", "key", "value", "remedy"),
    [
        ("train", "optimizer", "adamw", "sgd, with a smaller lr"),
        ("train", "momentum", 0.5, "0"),
        ("train", "weight_decay", 0.1, "0"),
        ("train", "clip", 1.0, "0"),
        ("adapter", "dropout", 0.1, "0"),
    ],
)
def test_what_has_no_effect_on_zero_order_steps_is_refused(section, key, value, remedy):
    (text,) = found("fedkseed", {section: {**(SGD if section == "train" else {}), key: value}})
    assert f"{section}.{key}={value} would have no effect; set {section}.{key}={remedy}, or choose" in text


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"packing": True}}, "packed rows cannot be; set data.packing=false"),
        ({"federation": {"staleness": 1}}, "does not declare that late updates may be added"),
        ({"federation": {"local_optimizer": "keep"}}, "set it to reset, or choose another method"),
        ({"train": SGD | {"local_steps_by_cluster": {"fast": 3}}}, "federation.method.draws=common has all"),
    ],
)
def test_what_zero_order_steps_cannot_do(sections, said):
    (text,) = found("fedkseed", sections, draws="common")
    assert said in text


def test_masked_modes_are_told_to_draw_common_directions():
    masked = {"routing": {"mode": "mask"}}
    assert found("fedkseed", masked, draws="common") == []
    (text,) = found("fedkseed", masked)
    assert "routing.mode=mask is to hide; set federation.method.draws=common, or routing.mode=plain" in text

"""The values the engine chooses where a DeepSpeed configuration says `auto`."""

from pathlib import Path

import pytest

from fedspeed.engine.ds_config import ModelFacts, resolve_autos
from fedspeed.errors import ConfigError

FACTS = ModelFacts(hidden=64, block=1000, trainable=500, largest=4000)


def zero3(threshold) -> dict:
    return {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold}}


def test_nothing_of_a_shared_base_stays_resident():
    asked = zero3("auto")
    assert (
        resolve_autos(asked, FACTS, Path("x"), False)["zero_optimization"][
            "stage3_param_persistence_threshold"
        ]
        == 256
    )
    for silent in (asked, {"zero_optimization": {"stage": 3}}):
        assert (
            resolve_autos(silent, FACTS, Path("x"), True)["zero_optimization"][
                "stage3_param_persistence_threshold"
            ]
            == 0
        )
    assert asked == zero3("auto"), "the caller's configuration is left alone"


def test_a_threshold_that_would_tear_the_gathers_of_a_shared_base_apart_is_refused():
    assert (
        resolve_autos(zero3(100), FACTS, Path("x"), False)["zero_optimization"][
            "stage3_param_persistence_threshold"
        ]
        == 100
    )
    with pytest.raises(ConfigError, match="stage3_param_persistence_threshold=100: .* set it to 0 or auto"):
        resolve_autos(zero3(100), FACTS, Path("x"), True)


def test_no_auto_is_left():
    with pytest.raises(AssertionError, match="zero_optimization.overlap_comm"):
        resolve_autos({"zero_optimization": {"overlap_comm": "auto"}}, FACTS, Path("x"), False)

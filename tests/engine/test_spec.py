"""Specifications of engines: kinds, capabilities, and models with some of the blocks."""

from dataclasses import replace

import numpy as np
import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.capabilities import CAPABILITIES, check_capabilities, kind_of
from fedspeed.engine.config import EngineConfig
from fedspeed.engine.spec import EngineSpec
from fedspeed.errors import ConfigError
from fedspeed.models.config import AdapterConfig, ModelConfig
from tests.engine.engines import engine
from tests.engine.small_models import DETERMINED, stirred, write_family
from tests.processes import run_clusters
from tests.tiny import random_step

SPEC = EngineSpec(
    model=ModelConfig(), adapter=AdapterConfig(), train=TrainConfig(), engine=EngineConfig(), deepspeed={}
)


@pytest.mark.parametrize(
    "kind,engine,adapter",
    [
        ("stock", {}, {}),
        ("streamed", {"tier": "ram"}, {}),
        ("stock", {}, {"targets": ("embed_tokens",)}),
        ("stock", {"tier": "stock"}, {"method": "full"}),
        ("client_pipeline", {"pipeline": "client"}, {}),
        ("cluster_pipeline", {"pipeline": "cluster"}, {}),
    ],
)
def test_a_configuration_means_a_kind(kind, engine, adapter):
    assert replace(SPEC, engine=EngineConfig(**engine), adapter=AdapterConfig(**adapter)).kind == kind


def test_where_zero_3_would_stream_the_base_is_executed_layer_by_layer():
    assert kind_of(EngineConfig(), {"zero_optimization": {"stage": 3}}, frozen=True) == "streamed"
    assert kind_of(EngineConfig(), {"zero_optimization": {"stage": 3}}, frozen=False) == "stock"
    assert (
        kind_of(EngineConfig(), {"zero_optimization": {"stage": 3}}, frozen=True, outside="lm_head")
        == "stock"
    )


def test_every_kind_has_its_builder():
    from fedspeed.engine.build import BUILDERS

    assert BUILDERS.keys() == CAPABILITIES.keys()


def test_what_an_engine_cannot_is_refused_before_anything_starts():
    for kind in CAPABILITIES.keys() - {"split"}:
        check_capabilities({"gradients", "perturb"}, kind, "federation.method=any")
        stage = 3 if kind == "stock" else 0
        with pytest.raises(
            ConfigError, match=f"federation.method=spry needs .* forward_gradients, which {kind} "
        ):
            check_capabilities(
                {"gradients", "forward_gradients"}, kind, "federation.method=spry", zero_stage=stage
            )
    check_capabilities({"forward_gradients"}, "stock", "federation.method=spry", zero_stage=2)


KEPT = (0, 2)


def shorter(rank, base, folder):
    """Write a copy of a base that has the blocks of KEPT only."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers = torch.nn.ModuleList([model.model.layers[b] for b in KEPT])
    model.config.num_hidden_layers = len(KEPT)
    model.config.layer_types = [model.config.layer_types[b] for b in KEPT]
    model.save_pretrained(folder)
    return str(folder)


def of_some_blocks(rank, base, blocks, nvme):
    """Return by tier the losses and the end of two steps, with the names of the shorter base."""
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    found = {}
    for kind in ("zero0", "ram"):
        with engine(
            base,
            kind,
            adapter=AdapterConfig(targets=("q_proj",)),
            train=DETERMINED,
            nvme=nvme,
            blocks=blocks,
            join=False,
        ) as client_engine:
            names = {
                name.replace(f".layers.{b}.", f".layers.{i}."): name
                for i, b in enumerate(blocks or (0, 1))
                for name in client_engine.names
                if f".layers.{b}." in name
            }
            assert len(names) == len(client_engine.names), "named as in the whole model"
            start = stirred({
                short: 0.0 * client_engine.state()[name] for short, name in names.items()
            })  # an adapter's values are drawn from its tensors' names
            client_engine.load({name: start[short] for short, name in names.items()})
            losses = [client_engine.train_step([random_step(3, 2, 2)], 0.1)[0].loss for _ in range(2)]
            end = client_engine.state()
            found[kind] = losses, {short: end[name].numpy() for short, name in names.items()}
            client_engine.close()
    leave_world()
    return found


def test_a_model_of_some_blocks_is_the_shorter_model(tmp_path):
    base = write_family("qwen2", tmp_path / "whole")  # it has two kinds of blocks
    [short] = run_clusters([1], shorter, base, tmp_path / "shorter")
    [found] = run_clusters([1], of_some_blocks, base, KEPT, tmp_path)
    [expected] = run_clusters([1], of_some_blocks, short, None, tmp_path)
    for kind in found:
        assert found[kind][0] == expected[kind][0]
        assert all(np.array_equal(found[kind][1][n], expected[kind][1][n]) for n in expected[kind][1])


@pytest.mark.parametrize("numbers", [(), (2, 0), (0, 0), (0, 4), (-1, 0)])
def test_blocks_that_do_not_exist_are_refused(numbers):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedspeed.models.blocks import keep_blocks

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=1, vocab_size=8
            )
        )
    with pytest.raises(ValueError, match="name some of the model's 4, from 0 on"):
        keep_blocks(model, numbers)


def test_a_need_that_is_no_capability_is_no_matter_of_engines():
    with pytest.raises(
        ValueError,
        match="any needs quantise, which is no capability; .* has gradients, .*a new one is a name there",
    ):
        check_capabilities({"gradients", "quantise"}, "stock", "federation.method=any")

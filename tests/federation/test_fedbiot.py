"""The parts of FedBiOT that compute without an engine: which blocks its emulator keeps, the proximal term,
and the names of its arrays in a state. tests/run/test_run_fedbiot.py has its runs.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.engine.spec import EngineSpec
from fedspeed.errors import ConfigError, JournalError, ModelError
from fedspeed.federation.folded_layout import shared_layout
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import make_method
from fedspeed.federation.methods.config import variant_of
from fedspeed.federation.methods.fedbiot.arrays import blocks_of, from_state, to_state
from fedspeed.federation.methods.fedbiot.emulator import divide, emulator_blocks
from fedspeed.federation.methods.fedbiot.method import FedBiOT
from fedspeed.federation.methods.fedbiot.proximal import proximal_gradient
from fedspeed.models.config import AdapterConfig, ModelConfig
from tests.federation.test_folding import ReceivingLink, SendingLink, packed
from tests.tiny import run_config

CONFIG = variant_of("fedbiot")()
SPEC = EngineSpec(
    model=ModelConfig(),
    adapter=AdapterConfig(),
    train=TrainConfig(),
    engine=EngineConfig(tier="ram"),
    deepspeed={},
)


def test_an_emulator_keeps_evenly_spaced_blocks():
    """As written out by hand: of 30 blocks 24 and 15; a half is rounded to the even number."""
    assert emulator_blocks(30, 0.2) == (
        *(0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18, 20, 21, 22, 23, 25, 26, 27),
        29,
    )
    assert emulator_blocks(30, 0.5) == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 29)
    assert emulator_blocks(26, 0.75) == (0, 5, 10, 15, 20, 25), "6.5 blocks are 6"
    assert emulator_blocks(30, 0.0) == tuple(range(30))
    assert emulator_blocks(30, 0.97) == (0,), "0.9 blocks are one"
    assert emulator_blocks(2, 0.5) == emulator_blocks(1, 0.2) == (0,)
    assert emulator_blocks(3, 0.3) == (0, 2)
    assert emulator_blocks(1, 0.5) == ()


def test_it_has_the_published_indices():
    for blocks, dropped in itertools.product(range(1, 41), (0.0, 0.2, 0.25, 0.5, 0.8)):
        kept = emulator_blocks(blocks, dropped)
        assert len(kept) == round(blocks * (1 - dropped)) and sorted(set(kept)) == list(kept)
        if len(kept) > 1:
            assert kept == tuple(int(np.floor(i * (blocks - 1) / (len(kept) - 1))) for i in range(len(kept)))
            assert (kept[0], kept[-1]) == (0, blocks - 1)


def test_a_base_with_too_few_blocks_is_refused():
    division = divide(4, adapter_blocks=3, dropped=0.2)
    assert (division.emulator, division.adapter, division.kept) == ((0,), (1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(ModelError, match="adapter_blocks=4: the base has 4 blocks.*choose at most 3"):
        divide(4, adapter_blocks=4, dropped=0.2)
    with pytest.raises(ModelError, match="dropped=0.9 leaves none of the 2 blocks .*choose less than 0.75"):
        divide(4, adapter_blocks=2, dropped=0.9)
    assert divide(4, adapter_blocks=2, dropped=0.74).emulator == (0,)


NAMES = ("m.2.q.lora_A.default.weight", "m.2.q.lora_B.default.weight")


@pytest.mark.parametrize("start", ["trained", "new"])
def test_the_proximal_gradient_is_that_of_the_dense_weights(start):
    """In fp64, by autograd; also from a new adapter, whose B is zero. The original's term has none."""
    import torch

    rng = np.random.default_rng(0)
    scale = 1.7
    first = {NAMES[0]: rng.standard_normal((3, 11)), NAMES[1]: rng.standard_normal((7, 3))}
    if start == "new":
        first[NAMES[1]][:] = 0
    now = {name: array + 0.1 * rng.standard_normal(array.shape) for name, array in first.items()}
    a, b = (torch.tensor(now[name], requires_grad=True) for name in NAMES)
    base = torch.tensor(rng.standard_normal((7, 11)))
    before = base + scale * torch.tensor(first[NAMES[1]] @ first[NAMES[0]])
    (base + scale * b @ a - before).square().sum().backward()
    found = proximal_gradient(now, first, scale)
    for name, expected in zip(NAMES, (a.grad, b.grad), strict=True):
        assert np.abs(found[name]).max() > 0.01
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-12, atol=1e-12)
    assert not any(gradient.any() for gradient in proximal_gradient(first, first, scale).values())


def test_it_keeps_its_digits_next_to_the_start():
    """In fp32, where B A - B_0 A_0 itself would have lost nearly all of them."""
    rng = np.random.default_rng(1)
    first = {NAMES[0]: rng.standard_normal((4, 50)), NAMES[1]: rng.standard_normal((60, 4))}
    first = {name: array.astype(np.float32) for name, array in first.items()}
    now = {name: array + np.float32(2**-18) for name, array in first.items()}
    exact, single = (
        proximal_gradient(
            *({n: t.astype(kind) for n, t in arrays.items()} for arrays in (now, first)), scale=2.0
        )
        for kind in (np.float64, np.float32)
    )
    for name in NAMES:
        assert single[name].dtype == np.float32
        np.testing.assert_allclose(single[name], exact[name], rtol=0, atol=1e-5 * np.abs(exact[name]).max())


def engine_arrays(blocks=(0, 2, 4, 5)):
    rng = np.random.default_rng(3)
    arrays = {}
    for block in blocks:
        for kind, shape in (("A", (2, 6)), ("B", (5, 2))):
            name = f"base_model.model.model.layers.{block}.x.q.lora_{kind}.default.weight"
            arrays[name] = rng.standard_normal(shape).astype(np.float32)
    return arrays


def test_the_emulators_lora_is_folded_in_the_state():
    arrays = engine_arrays()
    state = FedBiOT.arrays_of(CONFIG, arrays, role="server")
    module = "folded:base_model.model.model.layers.2.x.q"
    assert blocks_of(arrays, 2) == ((0, 2), (4, 5))
    assert {name for name in state if "folded" in name} == {
        f"{module.replace('2', block)}.{kind}" for block in "02" for kind in ("left", "right")
    }
    assert state[f"{module}.left"].shape == (5, 2), "it is B, of a product left times right"
    clients = {name: array for name, array in arrays.items() if ".4." in name or ".5." in name}
    assert FedBiOT.arrays_of(CONFIG, clients, role="client") == clients
    assert state.keys() & arrays.keys() == clients.keys()
    back = from_state(state, arrays)
    assert back.keys() == arrays.keys() and all(np.array_equal(back[n], arrays[n]) for n in arrays)
    exported = make_method(CONFIG, state, clients=2, seed=0).exports(state, {})
    assert {name: exported["adapter"].keys() for name in exported} == {"adapter": clients.keys()}


def test_a_resumed_run_knows_what_is_folded_without_lora():
    """Also factors that are no smaller than their product, as long as they are those of this run."""
    state = to_state(engine_arrays(), 2)
    wide = {n: np.zeros((5, 9) if n.endswith("left") else (9, 6), np.float32) for n in state if ":" in n}
    for known in (state, state | wide):
        sender = SendingLink()
        offered = packed(known)
        assert shared_layout(sender, packed(known), offered, 1.0) == offered
        assert shared_layout(ReceivingLink(sender.sent), packed(known), None, 0.0) == offered
    sender = SendingLink()
    with pytest.raises(JournalError, match="does not fit its product"):
        shared_layout(sender, packed(state), packed(state | wide), 1.0)


def shape():
    from fedspeed.models.families.registry import FAMILIES
    from fedspeed.models.families.values import ConfigValues

    values = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 260,
    }
    return FAMILIES["llama"].shape(ConfigValues(values, "config.json"), "small")


def test_roles_build_their_blocks_and_adapt_them():
    client, server = (
        FedBiOT.spec(replace(CONFIG, dropped=0.5), replace(SPEC, role=role), shape=shape())
        for role in ("client", "server")
    )
    assert client.blocks == (0, 3, 4, 5) and server.blocks is None
    assert client.adapter.targets == tuple(
        f"layers.{block}.self_attn.{name}" for block in (4, 5) for name in ("q_proj", "v_proj")
    )
    assert server.adapter.targets[4:] == client.adapter.targets and "layers.3." in server.adapter.targets[2]
    assert (client.engine.tier, client.kind) == ("ram", "streamed"), "as configured"
    assert (server.engine.tier, server.kind) == ("stock", "stock")
    with pytest.raises(ModelError, match="has no embed_tokens"):
        FedBiOT.spec(CONFIG, replace(SPEC, adapter=AdapterConfig(targets=("embed_tokens",))), shape=shape())
    partitioned = replace(SPEC, role="server", deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ConfigError, match="stage=3.*set deepspeed.zero_optimization.stage=2"):
        FedBiOT.spec(CONFIG, partitioned, shape=shape())


@pytest.mark.parametrize(
    "section,key,value",
    [
        ("adapter", "start_from", "folder"),
        ("engine", "compile_blocks", True),
        ("engine", "tier", "nf4"),
        ("adapter", "method", "blocks"),
        ("engine", "pipeline", "client"),
        ("federation", "staleness", 1),
        ("federation", "public_rows", ""),
    ],
)
def test_what_it_cannot_be_combined_with(section, key, value):
    from fedspeed.config.check import problems

    sections = {
        "model": {"base": "base"},
        "federation": {"method": {"name": "fedbiot"}, "public_rows": "rows.jsonl"},
    }
    assert problems(run_config(**sections)) == []
    sections[section] = sections.get(section, {}) | {key: value}
    found = " ".join(map(str, problems(run_config(**sections))))
    assert f"{section}.{key}" in found and "federation.method" in found


def test_the_server_trains_the_emulator_only_and_begins_each_round_where_the_last_one_ended():
    """Steps on public rows follow each other over rounds; the learning rate is the clients' or its own."""

    class Engine:
        names = tuple(engine_arrays())
        data_share = (1, 0)

        def __init__(self):
            self.calls = []

        def load(self, state, *, frozen, seed):
            self.arrays = {name: tensor.clone() for name, tensor in state.items()}
            self.calls.append((frozen, seed))

        def distil(self, batches, *, student, common, kl):
            from fedspeed.engine.distil_sums import DistilSums

            self.calls.append((batches, student, common, kl))
            return DistilSums(1.0, 1.0, 2)

        def step(self, lr):
            frozen, _ = self.calls[0]
            for name in self.arrays.keys() - frozen:
                self.arrays[name] += lr
            return [True]

        def state(self):
            return self.arrays

        def sum_over_client(self, values):
            return values

    class Trainer:
        def public_batches(self, step):
            return step

        def round_lr(self, round):
            return 0.25

    config = replace(CONFIG, initial_alignment_steps=2, alignment_steps=3, kl=0.5)
    state = to_state(engine_arrays(), 2)
    seeds = set()
    for round, steps, lr in ((0, (0, 1), 0.25), (1, (2, 3, 4), 0.25), (2, (5, 6, 7), 0.5)):
        chosen = replace(config, alignment_lr=0.5) if round == 2 else config
        method = make_method(chosen, state, clients=2, seed=4)
        engine = Engine()
        after = method.server_step(state, engine, None, round=round, exchange=0, trainer=Trainer())
        (frozen, seed), *calls = engine.calls
        seeds.add(seed)
        assert frozen == {name for name in state if ":" not in name}
        assert calls == [(step, (0, 2), 4, 0.5) for step in steps]
        for name, array in state.items():
            np.testing.assert_allclose(after[name], array + (":" in name) * lr * len(steps), atol=1e-6)
        assert Layout.of(after) == Layout.of(state)
    assert len(seeds) == 3
    off = make_method(replace(config, alignment_steps=0), state, clients=2, seed=4)
    assert off.server_step(state, None, None, round=1, exchange=0, trainer=None) is state

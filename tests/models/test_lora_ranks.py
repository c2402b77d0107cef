"""States of one LoRA rank for clients and engines of another: the products stay what they were."""

import numpy as np
import pytest

from fedspeed.models.config import AdapterConfig
from fedspeed.models.factors import pairs
from fedspeed.models.folded import LEFT, RIGHT, WHOLE, fold, folded_parts, named
from fedspeed.models.lora_ranks import client_ranks, cut, fitted, leading, of_rank, padded, ranks_text
from tests.models.products import products

SHAPES = {
    "x.q.lora_A.default.weight": (4, 30),
    "x.q.lora_B.default.weight": (20, 4),
    "x.q.lora_B.default.bias": (20,),
    "x.e.lora_embedding_A.default": (4, 9),
    "x.e.lora_embedding_B.default": (7, 4),
}


def drawn():
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def with_folded_arrays():
    """Factors in one module, a whole product in the other."""
    rng = np.random.default_rng(1)
    left = rng.standard_normal((20, 3))
    right = rng.standard_normal((3, 30))
    return (
        drawn()
        | named("x.q", fold({}, left, right))
        | named("x.e", {WHOLE: rng.standard_normal((7, 9)).astype(np.float32)})
    )


@pytest.mark.parametrize("make", [drawn, with_folded_arrays])
@pytest.mark.parametrize("lora_rank", [1, 3, 4, 6])
def test_the_products_are_those_of_the_common_state(make, lora_rank):
    state = make()
    found = fitted(state, lora_rank)
    for a, b in pairs(SHAPES):
        assert (len(found[a]), found[b].shape[1]) == (lora_rank, lora_rank)
        common = min(4, lora_rank)
        np.testing.assert_array_equal(found[a][:common], state[a][:common])
        np.testing.assert_array_equal(found[b][:, :common], state[b][:, :common])
        assert not found[a][4:].any() and not found[b][:, 4:].any()
        expected = products(state)[a]
        np.testing.assert_allclose(products(found)[a], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(found["x.q.lora_B.default.bias"], state["x.q.lora_B.default.bias"])
    assert all(array.dtype == np.float32 for array in found.values())


def test_what_is_folded_already_stays_in_place():
    """The engine uploads folded arrays again only where they are other ones."""
    state = with_folded_arrays()
    found = padded(state, 6)
    assert all(found[name] is state[name] for name in state if name.startswith("folded:"))
    assert set(folded_parts(cut(state, 3))["x.q"]) == {LEFT, RIGHT}


def test_a_product_of_zeros_is_not_folded():
    state = drawn() | {"x.q.lora_B.default.weight": np.zeros((20, 4), np.float32)}
    assert set(folded_parts(cut(state, 2))) == {"x.e"}


def test_the_leading_part_leaves_the_rest_out():
    state = drawn()
    assert {name: array.shape for name, array in leading(state, 3).items()} == {
        name: tuple(3 if size == 4 else size for size in shape) for name, shape in SHAPES.items()
    }
    assert (
        leading(state, 4).keys() == state.keys()
        and leading(state, 8)["x.q.lora_A.default.weight"].shape[0] == 4
    )


def test_the_scale_does_not_depend_on_the_rank():
    adapter = AdapterConfig(lora_rank=12, alpha=16.0, rank_by_client={"1": 5, "2": 12})
    assert client_ranks(adapter, 4) == (12, 5, 12, 12)
    for lora_rank in (5, 12):
        engine = of_rank(adapter, lora_rank)
        assert engine.alpha / engine.lora_rank == pytest.approx(16 / 12, rel=1e-15)
        assert engine.lora_rank == lora_rank and not engine.rank_by_client


def test_ranks_are_named_by_clients():
    assert ranks_text((16, 4)) == "client 0: 16, client 1: 4"
    assert ranks_text((16, 16, 4, 4, 4, 16)) == "clients 0 to 1: 16, clients 2 to 4: 4, client 5: 16"

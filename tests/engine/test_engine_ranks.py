"""Clients on an engine with another LoRA rank than theirs: they train and compute as on one of their own."""

import numpy as np
import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.models.config import AdapterConfig
from fedspeed.models.factors import pairs
from fedspeed.models.lora_ranks import cut, leading, of_rank
from tests.engine.engines import engine, in_world
from tests.engine.small_models import write_family
from tests.processes import run_clusters
from tests.tiny import random_step

LORA = AdapterConfig(targets="all-linear", lora_rank=8, alpha=12.0, dropout=0.2)
SMALL = 2  # the client's rank
STEPS = [random_step(3, 2, 3), random_step(4, 2, 3), random_step(5, 2, 3)]
OPTIMIZERS = {
    "adamw": TrainConfig(optimizer="adamw", eps=1e-2, weight_decay=0.1, clip=0.5),
    "sgd": TrainConfig(optimizer="sgd", momentum=0.9, weight_decay=0.1),
}


def as_torch(arrays):
    import torch

    return {n: torch.from_numpy(t) for n, t in arrays.items()}


def drawn(shapes):
    """A common state of LORA's rank, none of whose factors is zero."""
    rng = np.random.default_rng(5)
    common = {
        name: (LORA.lora_rank, shape[1]) if ".lora_A." in name else (shape[0], LORA.lora_rank)
        for name, shape in shapes.items()
    }
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in common.items()}


def trained(rank, base, kind, dtype, optimizer):
    """Return, by rank of the engine, what a client of rank SMALL trains: (held-out losses of the common state
    and of its leading directions alone, losses of the client's steps, its end).
    """
    found = {}
    for lora_rank in (SMALL, LORA.lora_rank):
        options = {
            "adapter": of_rank(LORA, lora_rank),
            "train": OPTIMIZERS[optimizer],
            "join": False,
            "gradient_clipping": OPTIMIZERS[optimizer].clip,
        }
        with engine(base, kind, dtype, **options) as client_engine:
            state = drawn({name: tensor.shape for name, tensor in client_engine.state().items()})
            held_out = []
            for loaded in (state, leading(state, SMALL)):
                client_engine.load(as_torch(loaded))
                with client_engine.matched_passes(
                    client_engine.eval_passes([STEPS[0].micro]), backward=False
                ):
                    held_out.append(client_engine.evaluate([STEPS[0].micro])[0].loss)
            with client_engine.matched_passes(client_engine.train_passes(1, 3, 3), backward=True):
                client_engine.load(as_torch(cut(state, SMALL)), seed=11)
                losses = [client_engine.train_step([step], 0.05)[0].loss for step in STEPS]
                end = {n: t.numpy() for n, t in client_engine.state().items()}
            for a, b in pairs(end):
                assert len(end[a]) == lora_rank
                assert not end[a][SMALL:].any() and not end[b][:, SMALL:].any(), "zeros stay zeros"
                assert (end[a][:SMALL] != state[a][:SMALL]).any()
            found[lora_rank] = held_out, losses, leading(end, SMALL)
            client_engine.close()
    return found


@pytest.mark.parametrize(
    ("kind", "dtype", "optimizer"),
    [
        ("zero0", "fp32", "adamw"),
        ("ram", "fp32", "sgd"),
        pytest.param("zero2", "bf16", "adamw", marks=pytest.mark.slow),
    ],
)
def test_the_rank_of_the_engine_changes_nothing(tmp_path, kind, dtype, optimizer):
    """Neither the loss of the whole common model, most of which is folded on a small engine, nor what a small
    client trains, with dropout, weight decay and clipping.
    """
    base = write_family("llama", tmp_path / "base")
    [found] = run_clusters([1], in_world, trained, base, kind, dtype, optimizer)
    (held_out, losses, end), (same_held_out, same_losses, same_end) = found.values()
    rounding = 5e-6 if dtype == "fp32" else 1e-2
    assert same_held_out == pytest.approx(held_out, rel=rounding)
    assert same_losses == pytest.approx(losses, rel=rounding)
    if dtype == "fp32":
        assert abs(held_out[0] - held_out[1]) > 1e-3 * held_out[0], "the other directions count"
        for name, array in end.items():
            np.testing.assert_allclose(same_end[name], array, rtol=0, atol=1e-5)

"""What a turn starts from and leaves behind: optimizers that are kept and restored, loss scales, and skipped
steps.
"""

import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig
from tests.engine.engines import engine
from tests.engine.small_models import LR, drawn, largest_difference
from tests.engine.test_engine import plain_losses
from tests.limits import LIMIT_S
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama

ADAPTER = AdapterConfig(targets="all-linear")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("base") / "llama")


def built(rank, base, nvme, kinds):
    """Return the largest difference of an untrained engine's masters from the adapter's initial values, and
    the types of its parameters.
    """
    import torch

    from fedspeed.engine.world import join_world, leave_world
    from fedspeed.models.adapters import initial_adapter

    join_world(LIMIT_S)
    out = {}
    for kind, dtype in kinds:
        with engine(
            base, kind, dtype, nvme=nvme, train=TrainConfig(lr=0.1, weight_decay=0.5), join=False
        ) as client_engine:
            start = {
                n: initial_adapter(n, v.shape, 0)
                .to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
                .float()
                for n, v in client_engine.state().items()
            }
            out[kind, dtype] = (
                largest_difference(client_engine.state(), start),
                {str(p.dtype) for p in client_engine.model.parameters()},
            )
    leave_world()
    return out


def test_building_an_engine_moves_nothing(base, tmp_path):
    """DeepSpeed takes one step without gradients while it initialises, which must apply no weight decay; and
    adapters of a 16-bit model are 16 bit.
    """
    kinds = [(kind, dtype) for kind in ("zero0", "zero2", "zero3", "ram") for dtype in ("fp32", "bf16")]
    [seen] = run_clusters([1], built, base, tmp_path, kinds)
    for (kind, dtype), (difference, types) in seen.items():
        assert difference == 0.0, (kind, dtype)
        assert types == {{"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]}, (kind, dtype)


def kept_by_a_fresh_engine(rank, base, nvme, kinds):
    from fedspeed.engine.world import join_world, leave_world

    join_world(LIMIT_S)
    out = {}
    for kind in kinds:
        with engine(base, kind, nvme=nvme, clients=[(0, 1)], join=False) as client_engine:
            client_engine.load(drawn(client_engine.state()))
            client_engine.train_step([random_step(1, 2, 1, 2, rank)], LR)[0]
            state = client_engine.state()
            kept = client_engine.optimizer_state()
            client_engine.train_step([random_step(2, 2, 1, 2, rank)], LR)[0]
            on = client_engine.state()
        with engine(base, kind, nvme=nvme, clients=[(0, 1)], join=False) as other:
            shapes = {n: v.shape for n, v in other.optimizer_state().items()}
            other.load(state, kept)
            other.train_step([random_step(2, 2, 1, 2, rank)], LR)[0]
            out[kind] = shapes == {n: v.shape for n, v in kept.items()}, largest_difference(other.state(), on)
    leave_world()
    return out


def test_a_fresh_engine_takes_up_a_kept_optimizer(base, tmp_path):
    """A resumed run does this before its first step."""
    for seen in run_clusters(
        [2], kept_by_a_fresh_engine, base, tmp_path, ["zero0", "zero1", "zero2", "zero3", "client"]
    ):
        for kind, (same_shapes, difference) in seen.items():
            assert same_shapes and difference == 0.0, kind


def without_finite_gradient(rank, base, nvme, kinds):
    from fedspeed.engine.world import join_world, leave_world

    join_world(LIMIT_S)
    out = {}
    for kind, dtype in kinds:
        with engine(base, kind, dtype, nvme=nvme, join=False) as client_engine:
            client_engine.load({n: v + 1e38 for n, v in client_engine.state().items()})
            bad = client_engine.train_step([random_step(1, 2, 1)], LR)[0]
            client_engine.load(drawn(client_engine.state()))
            good = client_engine.train_step([random_step(1, 2, 1)], LR)[0]
            out[kind, dtype] = bad.steps, good.steps
    leave_world()
    return out


def test_a_step_that_is_not_taken_is_not_counted(base, tmp_path):
    """The next turn starts as if there had been no such step."""
    [seen] = run_clusters(
        [1],
        without_finite_gradient,
        base,
        tmp_path,
        [
            ("zero0", "bf16"),
            ("zero2", "bf16"),
            ("zero3", "bf16"),
            ("zero2", "fp32"),
            ("ram", "bf16"),
            ("ram", "fp32"),
        ],
    )
    assert seen == dict.fromkeys(seen, (0, 1))


def fp16_steps(rank, base, nvme, kinds):
    from fedspeed.engine.world import join_world, leave_world

    join_world(LIMIT_S)
    out = {}
    sgd = TrainConfig(optimizer="sgd")
    for kind, dtype in kinds:
        with engine(base, kind, dtype, nvme=nvme, train=sgd, join=False) as client_engine:
            start = drawn(client_engine.state())
            client_engine.load(start)
            scale = getattr(client_engine._states[0].ds_engine.optimizer, "loss_scale", 1.0)
            taken = client_engine.train_step([random_step(1, 4, 1)], 0.1)[0]
            updated = client_engine.state()
            client_engine.load({n: v + 1e4 for n, v in start.items()})
            lost = client_engine.train_step([random_step(1, 4, 1)], 0.1)[0]
            lower = getattr(client_engine._states[0].ds_engine.optimizer, "loss_scale", 1.0)
            client_engine.load(start)
            again = getattr(client_engine._states[0].ds_engine.optimizer, "loss_scale", 1.0)
            out[kind, dtype] = (
                float((sum(((updated[n] - start[n]) ** 2).sum() for n in start)) ** 0.5),
                taken.steps,
                lost.steps,
                scale,
                lower,
                again,
            )
    leave_world()
    return out


def test_fp16_steps_are_as_long_as_fp32_steps_and_scales_start_anew(base, tmp_path):
    kinds = [
        ("zero0", "fp32"),
        ("zero0", "fp16"),
        ("zero1", "fp16"),
        ("zero2", "fp16"),
        ("zero3", "fp16"),
        ("ram", "fp16"),
    ]
    [seen] = run_clusters([1], fp16_steps, base, tmp_path, kinds)
    length = seen["zero0", "fp32"][0]
    for kind, dtype in kinds[1:]:
        updated, taken, lost, scale, lower, again = seen[kind, dtype]
        assert abs(updated / length - 1) < 0.03, (kind, updated, length)
        assert (taken, lost) == (1, 0), kind
        assert scale > 1 and again == scale, (kind, scale, lower, again)


def recomputed(rank, base, nvme, kind):
    with engine(
        base,
        kind,
        nvme=nvme,
        adapter=ADAPTER,
        options=EngineConfig(activation_checkpointing=True),
        train=TrainConfig(weight_decay=0.1),
    ) as client_engine:
        client_engine.load(client_engine.state())
        return [
            client_engine.train_step([step], LR)[0].loss / step.step_answer_tokens
            for step in (random_step(i % 2, 4, 1) for i in range(5))
        ]


@pytest.mark.parametrize("kind", ["zero0", "zero3"])
def test_recomputing_activations_changes_no_loss(base, tmp_path, kind):
    import torch

    expected = plain_losses(
        base, 5, lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1), AdapterConfig(targets="all-linear")
    )
    [losses] = run_clusters([1], recomputed, base, tmp_path, kind)
    assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-5

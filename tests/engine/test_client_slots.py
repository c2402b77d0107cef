"""A client slot trains two flat parameters; names stay the seam."""

import numpy as np
import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.client_state import ALIGN, flatten
from fedspeed.models.config import AdapterConfig
from tests.engine.engines import engine
from tests.engine.small_models import stirred
from tests.processes import run_clusters
from tests.tiny import random_step

DECAY = {
    "sgd": TrainConfig(optimizer="sgd", momentum=0.9, weight_decay=0.1),
    "adamw": TrainConfig(weight_decay=0.1),
}


def test_tensors_lie_apart_in_a_flat_parameter():
    import torch

    named = {"a": torch.arange(6.0).view(2, 3), "b": torch.full((ALIGN,), 7.0), "c": torch.tensor(5.0)}
    slices = flatten(named)
    parameter = slices["a"].parameter
    assert all(part.parameter is parameter for part in slices.values())
    assert [part.start for part in slices.values()] == [0, ALIGN, 2 * ALIGN]
    assert len(parameter) == 3 * ALIGN
    for name, tensor in named.items():
        assert torch.equal(slices[name].view_in(parameter.data), tensor)
    assert float(parameter.sum()) == float(sum(t.sum() for t in named.values()))


def partly_held(rank, base, kinds, dtype, nvme):
    """By kind: (what was held and has moved, what was not and has not, parameters of DeepSpeed's engine, ends
    of two steps).

    A flat parameter is larger than the bucket that ZeRO reduces at a time. Gradients are clipped, so that one
    which is held and not zeroed shows in the others.
    """
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    found = {}
    for kind, zero, optimizer in kinds:
        with engine(
            base,
            kind,
            dtype,
            adapter=AdapterConfig(targets="all-linear"),
            train=DECAY[optimizer],
            nvme=nvme,
            join=False,
            gradient_clipping=0.05,
            **(
                {"zero_optimization": {"stage": zero, "overlap_comm": False, "reduce_bucket_size": 100}}
                if zero is not None
                else {}
            ),
        ) as own:
            start = stirred(own.state())
            names = sorted(start)
            held = frozenset(names[::3])
            own.load(start, frozen=held)
            for seed in range(2):
                own.train_step([random_step(seed, 2, 2)], 0.05)
            end = own.state()
            moved = {name for name in names if (end[name] - start[name]).abs().max() > 0}
            found[kind, zero, optimizer] = (
                sorted(moved & held),
                sorted(set(names) - held - moved),
                len(own._states[0].parameters),
                {name: end[name].numpy() for name in names},
            )
            own.close()
    leave_world()
    return found


KINDS = [
    ("ram", 0, "sgd"),
    ("ram", 0, "adamw"),
    ("ram", 1, "adamw"),
    ("ram", 2, "sgd"),
    ("zero0", None, "adamw"),
    ("zero2", None, "sgd"),
    ("zero3", None, "sgd"),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_part_of_a_parameter_is_held(bases, tmp_path, dtype):
    [found] = run_clusters([1], partly_held, bases["llama"], KINDS, dtype, tmp_path)
    for (kind, zero, optimizer), (moved, stood, parameters, end) in found.items():
        case = f"{kind} ZeRO-{zero} {optimizer}"
        assert moved == [], f"{case}: held, and moved"
        assert stood == [], f"{case}: not held, and has not moved"
        assert parameters == (2 if kind == "ram" else len(end)), case
        if dtype == "fp32" and optimizer == "sgd":
            other = found["zero2", None, "sgd"][3]
            assert max(np.abs(end[name] - other[name]).max() for name in end) < 1e-5, case

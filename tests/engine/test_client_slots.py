"""A client slot trains two flat parameters; everything outside of it addresses tensors by their names."""

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


def partly_frozen(rank, base, kinds, dtype, nvme):
    """Return by tier: (frozen tensors that changed, trained ones that did not, the number of parameters in
    DeepSpeed's engine, the state after two steps).

    A flat parameter is larger than the bucket that ZeRO reduces at a time. Gradients are clipped, so that
    a frozen tensor's gradient would change the other tensors if it were not set to zero.
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
        ) as client_engine:
            start = stirred(client_engine.state())
            names = sorted(start)
            frozen = frozenset(names[::3])
            client_engine.load(start, frozen=frozen)
            for seed in range(2):
                client_engine.train_step([random_step(seed, 2, 2)], 0.05)
            end = client_engine.state()
            changed = {name for name in names if (end[name] - start[name]).abs().max() > 0}
            found[kind, zero, optimizer] = (
                sorted(changed & frozen),
                sorted(set(names) - frozen - changed),
                len(client_engine._states[0].parameters),
                {name: end[name].numpy() for name in names},
            )
            client_engine.close()
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


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_part_of_a_flat_parameter_may_be_frozen(bases, tmp_path, dtype):
    [found] = run_clusters([1], partly_frozen, bases["llama"], KINDS, dtype, tmp_path)
    for (kind, zero, optimizer), (changed, unchanged, parameters, end) in found.items():
        case = f"{kind} ZeRO-{zero} {optimizer}"
        assert changed == [], f"{case}: frozen, and changed"
        assert unchanged == [], f"{case}: trained, and did not change"
        assert parameters == (2 if kind == "ram" else len(end)), case
        if dtype == "fp32" and optimizer == "sgd":
            other = found["zero2", None, "sgd"][3]
            assert max(np.abs(end[name] - other[name]).max() for name in end) < 1e-5, case

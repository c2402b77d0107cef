"""What happens without the write of the masters: an aggregate that reaches the 16-bit copies alone is undone
by the next optimizer step, as in systems that only copy it into the model's parameters.
"""

from functools import partial

import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.models.config import AdapterConfig
from tests.engine.engines import engine
from tests.engine.small_models import drawn, largest_difference
from tests.limits import LIMIT_S
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama

KINDS = ("zero0", "zero1", "zero2", "zero2-cpu", "zero3-cpu")


def aggregate_with_and_without_masters(rank, base, kinds):
    """By (kind, whether masters are written): the held-out loss of the trained state, of the aggregate, and
    after a step of lr=0 on the aggregate; and how far the masters are from the aggregate then.
    """
    import torch

    from fedspeed.engine.masters import FragmentMasters
    from fedspeed.engine.world import join_world, leave_world

    join_world(LIMIT_S)
    out = {}
    write_fragment = FragmentMasters._write_fragment

    def keep_masters(self, part, value, key=None):
        """Write optimizer state only."""
        if key is not None:
            write_fragment(self, part, value, key)

    def load_copies(client_engine, state):
        """Load a state into the working copies, and leave the masters as they are."""
        masters = client_engine._states[0]._masters
        zero3 = getattr(masters, "_zero", None)
        kept = list(masters._master.values() if zero3 is None else zero3.fp32_partitioned_groups_flat)
        before = [tensor.clone() for tensor in kept]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FragmentMasters, "_write_fragment", keep_masters)
            client_engine.load(state)
        if not isinstance(masters, FragmentMasters):
            with torch.no_grad():
                for tensor, old in zip(kept, before):
                    tensor.copy_(old)

    def loss(client_engine):
        return client_engine.evaluate([random_step(9, 2, 1).micro])[0].loss

    adapter = AdapterConfig(targets="all-linear")
    for kind in kinds:
        with engine(
            base, kind, "bf16", clients=[(0,)], adapter=adapter, train=TrainConfig(), join=False
        ) as client_engine:
            aggregate = drawn(client_engine.state())
            for i in range(2):
                client_engine.train_step([random_step(i, 2, 2)], 1e-2)
            trained = client_engine.state()
            for repaired in (False, True):
                client_engine.load(trained)
                losses = [loss(client_engine)]
                (client_engine.load if repaired else partial(load_copies, client_engine))(aggregate)
                losses.append(loss(client_engine))
                client_engine.train_step([random_step(7, 2, 2)], 0.0)
                losses.append(loss(client_engine))
                out[kind, repaired] = (losses, largest_difference(client_engine.state(), aggregate))
    leave_world()
    return out


@pytest.mark.slow
def test_copies_alone_are_undone_by_the_next_step(tmp_path):
    base = write_llama(tmp_path / "llama")
    (found,) = run_clusters([1], aggregate_with_and_without_masters, base, KINDS)
    for kind in KINDS:
        (trained, aggregate, after), distance = found[kind, False]
        assert aggregate != trained, "the copies have the aggregate, so that an evaluation sees nothing"
        assert after == trained, f"{kind}: the step must have written the old masters over the copies"
        assert distance > 1e-3
        (_, aggregate, after), distance = found[kind, True]
        assert after == aggregate and distance == 0.0, kind

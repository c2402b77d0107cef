"""What lies between a step's gradients and its move: they add up, something may be added to them, masters may
be perturbed.
"""

import numpy as np
import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig
from tests.engine.engines import engine
from tests.engine.small_models import stirred
from tests.processes import run_clusters
from tests.tiny import random_step

SGD = TrainConfig(optimizer="sgd", momentum=0.0)
LORA = AdapterConfig(targets="all-linear", lora_rank=4)
RATE = 0.25
PULL = 2.0


def as_arrays(tensors):
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def probed(rank, base, kinds, dtype, clients, *, pipeline):
    """By kind, states of one client slot: at the start, after a step, after another one with what was added
    to its gradients, without, after one on gradients that were computed twice, after perturbations that undo
    each other, and after a step with nothing but what was added.
    """
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    found = {}
    for kind in kinds:
        with engine(
            base,
            kind,
            dtype,
            clients=clients,
            adapter=LORA,
            train=SGD,
            join=False,
            options=EngineConfig(pipeline=pipeline),
        ) as own:
            ranks, rank_of_client = own.data_share
            start = stirred(own.state())
            frozen = frozenset(own.names[:1])

            def step_of(seed, ranks=ranks, share=rank_of_client):
                return [random_step(seed, 2, 2, ranks, share)]

            def begun(forgotten=False, own=own, start=start, frozen=frozen, step_of=step_of):
                if forgotten:
                    own.gradients(step_of(5))
                own.load(start, frozen=frozen)
                assert own.gradients(step_of(0))[0].steps == 0
                before = as_arrays(own.masters())
                assert own.step(RATE) == [True]
                return before, as_arrays(own.state())

            states = [as_arrays(start), *begun()]
            pull = {name: states[2][name] - states[0][name] for name in states[0]}
            own.gradients(step_of(1))
            own.add_to_gradients(0, pull, PULL)
            own.step(RATE)
            states.append(as_arrays(own.state()))
            begun(forgotten=True)
            own.train_step(step_of(1), RATE)
            states.append(as_arrays(own.state()))
            begun()
            own.gradients(step_of(1))
            own.gradients(step_of(1))
            own.step(RATE)
            states.append(as_arrays(own.state()))
            own.load(start, frozen=frozen)
            own.perturb(0, 7, 0.01)
            states.append(as_arrays(own.state()))
            own.perturb(0, 7, -0.02)
            own.perturb(0, 7, 0.01)
            states.append(as_arrays(own.state()))
            own.load(start, frozen=frozen)
            own.add_to_gradients(0, pull, PULL)
            assert own.step(RATE) == [True]
            states.append(as_arrays(own.state()))
            found[kind] = states, sorted(frozen)
            own.close()
    leave_world()
    return found


CASES = [
    (("zero0", "zero2", "zero3", "resident"), "fp32", ((0,),), "none"),
    (("zero0", "zero2", "ram"), "fp16", ((0,),), "none"),
    (("zero0", "zero2", "zero3", "ram"), "fp32", ((0, 1),), "none"),
    (("resident", "ram"), "fp32", ((0, 1),), "client"),
    (("resident",), "fp32", ((0,), (1,)), "cluster"),
]


@pytest.mark.parametrize(
    "kinds,dtype,clients,pipeline", CASES, ids=["one rank", "fp16", "two ranks", "pipeline", "cluster"]
)
def test_gradients_wait_for_their_step(bases, kinds, dtype, clients, pipeline):
    ranks = run_clusters(
        [sum(map(len, clients))], probed, bases["llama"], kinds, dtype, clients, pipeline=pipeline
    )
    rounding = 1e-3 if dtype == "fp32" else 0.05  # of a step's length
    for kind in kinds:
        for states, frozen in (found[kind] for found in ranks):
            start, before, after, pulled, plain, twice, perturbed, back, alone = states
            for name in start:
                case = f"{kind} {dtype}: {name}"
                assert np.array_equal(start[name], before[name]), f"{case} moved before its step"
                if name in frozen:
                    assert all(np.array_equal(start[name], state[name]) for state in states), (
                        f"{case} is frozen, and moved"
                    )
                    continue
                length = np.abs(after[name] - start[name]).max()
                assert length > 0, f"{case} has not moved"
                exact = rounding * length + 2e-8
                expected = plain[name] - RATE * PULL * (after[name] - start[name])
                assert np.abs(pulled[name] - expected).max() < exact, (
                    f"{case}: what was added is not in the step"
                )
                assert (
                    np.abs(alone[name] - (start[name] - RATE * PULL * (after[name] - start[name]))).max()
                    < exact
                ), f"{case}: not from zero"
                doubled = after[name] + 2 * (plain[name] - after[name])
                assert np.abs(twice[name] - doubled).max() < exact, f"{case}: two gradients are not their sum"
                assert 0.001 < np.abs(perturbed[name] - start[name]).mean() < 0.02, (
                    f"{case} was not perturbed"
                )
                assert np.abs(back[name] - start[name]).max() < 1e-6, (
                    f"{case}: the perturbations do not undo each other"
                )
        assert all(
            np.array_equal(found[kind][0][6][n], ranks[0][kind][0][6][n])
            for found in ranks
            for n in ranks[0][kind][0][6]
        )

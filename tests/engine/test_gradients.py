"""Between `gradients` and `step`: gradients of several calls add up, a method may add to them, and masters
may be perturbed.
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
    """Return by tier the states of one client slot: at the start, after a step, after a second step with
    something added to its gradients, after one without, after one whose gradients were computed twice, after
    a perturbation, after perturbations that cancel, and after a step whose gradient is only what was added.
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
        ) as client_engine:
            ranks, rank_of_client = client_engine.data_share
            start = stirred(client_engine.state())
            frozen = frozenset(client_engine.names[:1])

            def step_of(seed, ranks=ranks, share=rank_of_client):
                return [random_step(seed, 2, 2, ranks, share)]

            def begun(
                forgotten=False, client_engine=client_engine, start=start, frozen=frozen, step_of=step_of
            ):
                if forgotten:
                    client_engine.gradients(step_of(5))
                client_engine.load(start, frozen=frozen)
                assert client_engine.gradients(step_of(0))[0].steps == 0
                before = as_arrays(client_engine.masters())
                assert client_engine.step(RATE) == [True]
                return before, as_arrays(client_engine.state())

            states = [as_arrays(start), *begun()]
            pull = {name: states[2][name] - states[0][name] for name in states[0]}
            client_engine.gradients(step_of(1))
            client_engine.add_to_gradients(0, pull, PULL)
            client_engine.step(RATE)
            states.append(as_arrays(client_engine.state()))
            begun(forgotten=True)
            client_engine.train_step(step_of(1), RATE)
            states.append(as_arrays(client_engine.state()))
            begun()
            client_engine.gradients(step_of(1))
            client_engine.gradients(step_of(1))
            client_engine.step(RATE)
            states.append(as_arrays(client_engine.state()))
            client_engine.load(start, frozen=frozen)
            client_engine.perturb(0, 7, 0.01)
            states.append(as_arrays(client_engine.state()))
            client_engine.perturb(0, 7, -0.02)
            client_engine.perturb(0, 7, 0.01)
            states.append(as_arrays(client_engine.state()))
            client_engine.load(start, frozen=frozen)
            client_engine.add_to_gradients(0, pull, PULL)
            assert client_engine.step(RATE) == [True]
            states.append(as_arrays(client_engine.state()))
            found[kind] = states, sorted(frozen)
            client_engine.close()
    leave_world()
    return found


CASES = [
    pytest.param(("zero0", "zero2", "zero3", "resident"), "fp32", ((0,),), "none", id="one rank"),
    pytest.param(("zero0", "zero2", "ram"), "fp16", ((0,),), "none", id="fp16"),
    pytest.param(
        *(("zero0", "zero2", "zero3", "ram"), "fp32", ((0, 1),), "none"),
        id="two ranks",
        marks=pytest.mark.slow,
    ),
    pytest.param(("resident", "ram"), "fp32", ((0, 1),), "client", id="pipeline"),
    pytest.param(("resident",), "fp32", ((0,), (1,)), "cluster", id="cluster"),
]


@pytest.mark.parametrize("kinds,dtype,clients,pipeline", CASES)
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
                assert np.array_equal(start[name], before[name]), f"{case} changed before its step"
                if name in frozen:
                    assert all(np.array_equal(start[name], state[name]) for state in states), (
                        f"{case} is frozen, and changed"
                    )
                    continue
                length = np.abs(after[name] - start[name]).max()
                assert length > 0, f"{case} did not change"
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

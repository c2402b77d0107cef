"""Methods in which clients keep arrays, or send other values than deltas, between organisations."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.run.launched import last_round, records
from tests.run.sites import Federation

SIZE = 3
NAMES = ("scaffold", "fedsa", "fedkseed")
OPTIONS = {"fedkseed": ("federation.method.draws=common",)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sites_come_to_one_state_by_masked_sums(shared_workshop, name):
    sites = Federation(shared_workshop, f"sites {name}", SIZE)
    method = (f"federation.method.name={name}", *OPTIONS.get(name, ()))
    started = sites.start_sites(*method, "train.optimizer=sgd", "train.lr=0.01", "federation.rounds=2")
    ended = [site.wait() for site in started]
    assert [end.code for end in ended] == [0] * SIZE, "\n".join(end.text for end in ended)
    states = [load_file(last_round(sites.run(i)) / "state.safetensors") for i in range(SIZE)]
    for state in states[1:]:
        assert all(np.array_equal(state[n], array) for n, array in states[0].items())
    assert all(record["update_norm"] > 0 for record in records(sites.run(0))[1:])
    if name == "scaffold":
        mean = mean_control(sites)
        assert max(float(np.abs(array).max()) for array in mean.values()) > 1e-3
        for array, expected in mean.items():
            np.testing.assert_allclose(states[0][f"global/control:{array}"], expected, rtol=0, atol=1e-5)


def mean_control(sites):
    """Return the mean of the control variates that the sites' clients keep, by name of the array. Their rows
    have answers of the same length.
    """
    kept = [load_file(last_round(sites.run(i)) / "client-0.safetensors") for i in range(SIZE)]
    weights = np.array([0.9 * (40 + 10 * i) for i in range(SIZE)])
    return {
        name.removeprefix("memory/"): np.average([own[name] for own in kept], axis=0, weights=weights)
        for name in kept[0]
        if name.startswith("memory/")
    }

"""The section `A new method` of docs/extending.md, run as it stands there: in a copy of the package, with the
new file and the one line.
"""

import json
import os
import shutil

import pytest

from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.page_examples import after, copy_with_example, run_in
from tests.run.launched import SETTINGS, Workshop, records
from tests.warm import WarmProcess

# Code for a process that has imported the package: it imports the copy's instead.
ANEW = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "fedspeed"]:
    del sys.modules[name]
sys.path.insert(0, {copy!r})
"""

USE = """
import json
import numpy as np
from fedspeed.config.load import load
from fedspeed.errors import ConfigError
from fedspeed.federation.methods.base import make_method

given = ["model.base=m", "federation.method=trimmed_mean"]
chosen = load(None, given).config.federation.method
refused = ""
try:
    load(None, [*given, "routing.mode=mask", "federation.server_optimizer=yogi"])
except ConfigError as error:
    refused = str(error)
start = {"w": np.zeros((2, 2), np.float32), "x.lora_A.default.weight": np.ones((1, 3), np.float32)}
method = make_method(chosen, start, clients=4, seed=0)
total = np.zeros(method.values(1), np.float32)
for client, change in enumerate((1.0, 3.0, -1e9, 2.0)):
    turn = method.turn(client, 1, start, steps=1, seed=0, memory={})
    total += method.encode(turn, {n: a + np.float32(change) for n, a in start.items()}, 10.0 + client)
state = method.aggregate(start, total, 46.0, round=1).state
print(json.dumps({"state": {n: sorted(set(a.reshape(-1).tolist())) for n, a in state.items()},
                  "norm": method.update_norm(start, state), "models": sorted(method.models(state, {})),
                  "refused": refused,
                  "holders": method.min_holders(method.config, dict.fromkeys(range(4), 0), 0)}))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package with the page's new file and its one line; gives its folder."""
    registry = "fedspeed/federation/methods/config.py"
    folder = tmp_path_factory.mktemp("copy")
    copy_with_example(folder, "A new method", registry, after("METHODS = {"))
    shutil.copy(ROOT / "launch.py", folder)
    return folder


def test_the_example_of_a_new_method_trains(copy, tmp_path):
    """A whole run on two ranks, by `launch.py` of the copy."""
    workshop = Workshop(tmp_path / "workshop")
    federation = {"method": "trimmed_mean", "rounds": 1}
    config = workshop.write_config("run.yaml", {**SETTINGS, "federation": federation})
    out = tmp_path / "out"
    err = tmp_path / "err"
    for path in (out, err):
        path.touch()
    command = [str(copy / "launch.py"), "--config", str(config), "run.name=trimmed", "monitor.plot=false"]
    process = WarmProcess(command, tmp_path, os.environ, out, err, before=ANEW.format(copy=str(copy)))
    try:
        assert process.wait(LIMIT_S) == 0, out.read_text() + err.read_text()
    finally:
        process.terminate()
    record = records(workshop.runs / "trimmed")[-1]
    assert (record["round"], record["received"], record["factor_error"]) == (1, 3, None)
    assert record["update_norm"] > 0
    assert (workshop.runs / "trimmed" / "adapter" / "adapter_model.safetensors").exists()


def test_the_example_of_a_new_method_works_as_it_stands(copy):
    found = json.loads(run_in(copy, USE))
    assert found["state"] == {"w": [1.5], "x.lora_A.default.weight": [2.5]}, (
        "the mean of 1 and 2, without -1e9 and 3"
    )
    assert abs(found["norm"] - 1.5 * 7**0.5) < 1e-6 and found["models"] == ["adapter"]
    assert found["holders"] == 1
    assert "trimmed_mean needs every client's own values, which routing.mode=mask" in found["refused"]
    assert "federation.server_optimizer=yogi might combine arrays" in found["refused"]

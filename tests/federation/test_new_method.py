"""The section `A new method` of docs/extending.md, run as it stands there: in a copy of the package, with the
new file and the one line."""

import json
import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT
from tests.limits import LIMIT_S

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
for client, moved in enumerate((1.0, 3.0, -1e9, 2.0)):
    turn = method.turn(client, 1, start, steps=1, seed=0, memory={})
    total += method.encode(turn, {n: a + np.float32(moved) for n, a in start.items()}, 10.0 + client)
state = method.aggregate(start, total, 46.0, round=1).state
print(json.dumps({"state": {n: sorted(set(a.reshape(-1).tolist())) for n, a in state.items()},
                  "norm": method.update_norm(start, state), "models": sorted(method.models(state, {})),
                  "refused": refused, "holders": method.min_holders(method.config, range(4), 0)}))
"""


def test_the_example_of_a_new_method_works_as_it_stands(tmp_path):
    text = (
        (ROOT / "docs" / "extending.md").read_text().partition("## A new method\n")[2].partition("\n## ")[0]
    )
    path = re.search(r"One new file, `(\S+)`:", text)[1]
    new_file, line = re.findall(r"```python\n(.*?)```", text, re.S)
    shutil.copytree(ROOT / "fedspeed", tmp_path / "fedspeed", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / path).write_text(new_file)
    registry = tmp_path / "fedspeed/federation/methods/config.py"
    before = registry.read_text()
    registry.write_text(before.replace("METHODS = {\n", f"METHODS = {{\n{line}"))
    assert len(set(registry.read_text().splitlines()) - set(before.splitlines())) == 1, "the one line"
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["state"] == {"w": [1.5], "x.lora_A.default.weight": [2.5]}, (
        "the mean of 1 and 2, without -1e9 and 3"
    )
    assert abs(found["norm"] - 1.5 * 7**0.5) < 1e-6 and found["models"] == ["adapter"]
    assert found["holders"] == 1
    assert "trimmed_mean needs every client's own values, which routing.mode=mask" in found["refused"]
    assert "federation.server_optimizer=yogi might mix" in found["refused"]

"""The example of docs/extending.md, as it stands there: one new file and one line make a transport."""

import os
import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT
from tests.limits import LIMIT_S

# Runs in a copy of the package that has the example in it.
PROGRAM = """
import threading
import fedspeed
from fedspeed.config.load import load
from tests.routing.contract import contract, in_threads, opened

class Store(dict):
    '''What the ranks of a job share.'''
    there = threading.Condition()
    def set(self, key, text):
        with self.there:
            self[key] = text.encode()
            self.there.notify_all()
    def get(self, key):
        with self.there:
            assert self.there.wait_for(lambda: key in self, 60)
            return self[key]

config = load(None, ["model.base=m", "routing.transport=folder"]).config
assert (config.routing.transport, config.routing.sums_only) == ("folder", False)
store = Store()
transports = [opened("folder", rank, 3, connect=lambda prefix: store) for rank in range(3)]
results = in_threads(transports, contract)
assert len({result["digest"] for result in results}) == 1
for transport in transports:
    transport.close()
print("FOLDER", store["folder"].decode())
print(fedspeed.__file__)
"""


def example() -> list[str]:
    """The blocks of code in the page's section."""
    page = (ROOT / "docs" / "extending.md").read_text()
    section = page.partition("\n## A new transport\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_example_of_a_new_transport(tmp_path):
    module, line = example()
    shutil.copytree(ROOT / "fedspeed", tmp_path / "fedspeed", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fedspeed" / "routing" / "transports" / "folder.py").write_text(module)
    config = tmp_path / "fedspeed" / "routing" / "config.py"
    text = config.read_text()
    assert text.count("\nTRANSPORTS = {\n") == 1
    config.write_text(text.replace("\nTRANSPORTS = {\n", f"\nTRANSPORTS = {{\n{line}"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    _, folder, where = done.stdout.split()
    assert not os.path.exists(folder), "the last participant has removed it"
    assert where.startswith(str(tmp_path))

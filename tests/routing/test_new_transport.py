"""The example of docs/extending.md, as it stands there: one new file and one line make a transport."""

import os

from tests.conftest import ROOT
from tests.page_examples import after, copy_with_example, run_in

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


def test_the_example_of_a_new_transport(tmp_path):
    registry = "fedspeed/routing/config.py"
    copy_with_example(tmp_path, "A new transport", registry, after("TRANSPORTS = {"))
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    _, folder, where = run_in(tmp_path, PROGRAM, env=env).split()
    assert not os.path.exists(folder), "the last participant has removed it"
    assert where.startswith(str(tmp_path))

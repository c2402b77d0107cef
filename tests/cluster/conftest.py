"""A working folder for tests of how hostfiles are searched for."""

import pytest

from fedspeed.cluster import hostfile_search


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Return a working folder with an empty folder `hostfiles`; this machine's /job/hostfile is not read."""
    (tmp_path / "hostfiles").mkdir()
    monkeypatch.setattr(hostfile_search, "_DEEPSPEED_DEFAULT", tmp_path / "nowhere")
    return tmp_path

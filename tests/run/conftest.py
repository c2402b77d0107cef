"""One folder of tiny runs for all tests here, and one uninterrupted run that others are compared with."""

import shutil
from pathlib import Path

import pytest

from tests.run.launched import COLD, Workshop


@pytest.fixture(scope="session")
def shared_workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    yield workshop
    workshop.close()


@pytest.fixture
def workshop(shared_workshop):
    yield shared_workshop
    shared_workshop.close()


@pytest.fixture(scope="session")
def whole(shared_workshop):
    """(how it ended, its folder) of an uninterrupted run with `--json`."""
    return shared_workshop.finish_run(
        "--json", "run.name=whole", launcher=COLD
    ), shared_workshop.runs / "whole"


@pytest.fixture
def copy_of_whole(whole, shared_workshop):
    """Makes copies of the finished run under other names; gives their folders."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole[1], shared_workshop.runs / name))

    return copy


@pytest.fixture(scope="session")
def rises(shared_workshop):
    """The folder of a run with server steps so long that the held-out loss rises in the end: its best round
    is not its last.
    """
    shared_workshop.finish_run("run.name=rises", "federation.server_lr=3", "monitor.plot=false")
    return shared_workshop.runs / "rises"

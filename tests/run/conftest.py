"""Fixtures for tiny runs: one folder for all tests here, and an uninterrupted run for comparison."""

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
    """Return how an uninterrupted run with `--json` ended, and its folder."""
    return shared_workshop.finish_run(
        "--json", "run.name=whole", launcher=COLD
    ), shared_workshop.runs / "whole"


@pytest.fixture
def copy_of_whole(whole, shared_workshop):
    """Return a function that copies the finished run to a new name and returns the folder."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole[1], shared_workshop.runs / name))

    return copy


@pytest.fixture(scope="session")
def rises(shared_workshop):
    """Return the folder of a run whose server steps are so long that the held-out loss rises at the end: its
    best round is not its last.
    """
    shared_workshop.finish_run("run.name=rises", "federation.server_lr=3", "monitor.plot=false")
    return shared_workshop.runs / "rises"

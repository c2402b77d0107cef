"""The lock that torch takes while an operator is built, and what a killed build leaves behind."""

import os
import threading
import time

import pytest

from fedspeed.engine import operators
from fedspeed.errors import FedSpeedError


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    from torch.utils.cpp_extension import _get_build_directory

    return os.path.join(_get_build_directory("some_op", verbose=False), "lock")


def test_nobody_builds(lock):
    operators.await_build("some_op")


def test_a_living_build_is_waited_for(lock):
    open(lock, "w").close()
    threading.Timer(0.5, os.unlink, [lock]).start()
    begin = time.monotonic()
    operators.await_build("some_op")
    assert time.monotonic() - begin >= 0.5


def test_a_slow_build_is_waited_for(lock):
    """Its process has the lock open, however long no file changes."""
    lock_file = open(lock, "w")
    os.utime(lock, (0, time.time() - operators.DEAD_BUILD_S - 1))
    threading.Timer(0.5, lambda: (os.unlink(lock), lock_file.close())).start()
    operators.await_build("some_op")


def test_a_dead_build_is_reported(lock):
    open(lock, "w").close()
    os.utime(lock, (0, time.time() - operators.DEAD_BUILD_S - 1))
    with pytest.raises(FedSpeedError, match="some_op/lock: left by a build .* delete the file"):
        operators.await_build("some_op")

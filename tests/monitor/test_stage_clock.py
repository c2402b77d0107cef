import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspeed.monitor.clock import STAGES, StageClock, peak_bytes
from tests.limits import LIMIT_S


class ManualTime:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_time_in_an_inner_stage_is_not_counted_in_the_outer():
    time = ManualTime()
    clock = StageClock(time)
    time.now += 1
    with clock.stage("compute"):
        time.now += 2
        with clock.stage("gather"):
            time.now += 4
            with clock.stage("idle"):
                time.now += 8
        time.now += 16
    time.now += 32
    assert clock.snapshot_and_reset() == {
        "compute": 18.0,
        "gather": 4.0,
        "exchange": 0.0,
        "idle": 8.0,
        "other": 33.0,
    }


def test_a_stage_inside_itself_counts_once():
    time = ManualTime()
    clock = StageClock(time)
    with clock.stage("compute"), clock.stage("compute"):
        time.now += 3
    assert clock.snapshot_and_reset()["compute"] == 3.0


def test_a_snapshot_in_mid_stage_splits_it():
    time = ManualTime()
    clock = StageClock(time)
    with clock.stage("exchange"):
        time.now += 2
        first = clock.snapshot_and_reset()
        time.now += 5
    second = clock.snapshot_and_reset()
    assert (first["exchange"], second["exchange"], second["other"]) == (2.0, 5.0, 0.0)


def test_an_error_inside_closes_the_stage():
    time = ManualTime()
    clock = StageClock(time)
    with pytest.raises(KeyError), clock.stage("compute"):
        time.now += 1
        raise KeyError
    time.now += 2
    assert clock.snapshot_and_reset() == {
        "compute": 1.0,
        "gather": 0.0,
        "exchange": 0.0,
        "idle": 0.0,
        "other": 2.0,
    }


def test_an_unknown_stage_is_a_bug():
    with pytest.raises(AssertionError, match="training"), StageClock().stage("training"):
        pass


def test_a_stage_opened_by_another_thread_while_this_one_waits():
    # As autograd on an accelerator: hooks run in another thread while the caller waits in backward.
    time = ManualTime()
    clock = StageClock(time)

    def hook():
        with clock.stage("gather"):
            time.now += 3

    with clock.stage("compute"):
        time.now += 1
        thread = threading.Thread(target=hook)
        thread.start()
        thread.join(LIMIT_S)
        time.now += 1
    assert clock.snapshot_and_reset() == {
        "compute": 2.0,
        "gather": 3.0,
        "exchange": 0.0,
        "idle": 0.0,
        "other": 0.0,
    }


MOVES = st.recursive(
    st.integers(0, 5),
    lambda inner: st.tuples(st.sampled_from((*STAGES, "snapshot")), st.lists(inner, max_size=4)),
    max_leaves=20,
)


@given(st.lists(MOVES, max_size=6))
def test_the_parts_always_add_up_to_the_wall(moves):
    time = ManualTime()
    clock = StageClock(time)
    taken = []

    def play(move):
        if isinstance(move, int):
            time.now += move
        elif move[0] == "snapshot":
            taken.append(clock.snapshot_and_reset())
            for part in move[1]:
                play(part)
        else:
            with clock.stage(move[0]):
                for part in move[1]:
                    play(part)

    for move in moves:
        play(move)
    taken.append(clock.snapshot_and_reset())
    assert sum(sum(parts.values()) for parts in taken) == time.now - 100.0


def test_peak_memory_sees_a_block_that_is_gone_again():
    code = (
        "block = b'x' * (96 << 20); del block; from fedspeed.monitor.clock import peak_bytes; "
        "print(peak_bytes())"
    )
    child = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=LIMIT_S).stdout
    )
    assert 96 << 20 < child < 200 << 20


def test_peak_memory_of_a_child_is_its_own():
    block = b"x" * (256 << 20)
    code = "from fedspeed.monitor.clock import peak_bytes; print(peak_bytes())"
    child = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=LIMIT_S).stdout
    )
    assert 1 << 20 < child < 200 << 20
    del block


def test_peak_memory_of_a_rank_that_uses_a_gpu(monkeypatch):
    class Cuda:
        @staticmethod
        def is_available():
            return True

        @staticmethod
        def is_initialized():
            return True

        @staticmethod
        def max_memory_allocated():
            return 12345

    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": Cuda}))
    assert peak_bytes() == 12345

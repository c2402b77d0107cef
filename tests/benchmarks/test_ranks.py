"""Functions that benchmarks share: processes that end without a result, and imports without side effects."""

import os
import subprocess
import sys

import pytest

from benchmarks.common import quartiles, run_ranks
from tests.conftest import ROOT
from tests.limits import LIMIT_S


def vanish(rank, results):
    """End with exit code 0 and without a result, as a process that had run out of memory once did."""
    os._exit(0)


def answer(rank, results):
    results.put((rank, 10 * rank))


def test_a_rank_that_ends_without_a_result_has_failed():
    with pytest.raises(SystemExit, match="rank 0 ended with 0 and without a result"):
        run_ranks(vanish, 1, lambda rank, port: (rank,))
    assert run_ranks(answer, 2, lambda rank, port: (rank,)) == {0: 0, 1: 10}


def test_importing_a_benchmark_does_not_choose_the_device():
    """Other benchmarks import its functions and compute on a GPU."""
    env = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    names = (
        "layer_major",
        "memory",
        "plan_accuracy",
        "client_slots",
        "gpu.__main__",
        "gpu.engines",
        "gpu.perf",
        "gpu.stock",
    )
    script = (
        "".join(f"import benchmarks.{name}\n" for name in names)
        + "import os\nassert 'DS_ACCELERATOR' not in os.environ"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, check=True, timeout=LIMIT_S)


def test_ratios_are_of_neighbours():
    """A machine that slows down threefold between two pairs of steps does not change their ratios."""
    assert quartiles([2.0, 6.0, 2.2], [1.0, 3.0, 1.0]) == pytest.approx((2.0, 2.0, 2.1))
    assert quartiles([3.0], [2.0]) == (1.5, 1.5, 1.5)


@pytest.mark.slow
def test_resident_systems_are_compared_on_equal_losses():
    arguments = (
        "resident --blocks 2 --hidden 64 --micro 2 --tokens 16 --vocab 260 --repeat 1 --threads 1".split()
    )
    ended = subprocess.run(
        [sys.executable, "benchmarks/layer_major.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.returncode == 0, ended.stderr
    losses = [line.partition("loss ")[2].split() for line in ended.stdout.splitlines() if "loss " in line]
    assert len(losses) == 4
    for step in (0, -1):
        assert [float(loss[step]) for loss in losses] == pytest.approx([float(losses[0][step])] * 4, rel=1e-5)
    assert "speed of layer-major relative to plain PyTorch" in ended.stdout

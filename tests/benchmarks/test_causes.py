"""Ratios of pairs, the words for differences, and the page and the plot of `causes`."""

import json
import math

import pytest

from benchmarks.compare.causes.ratios import Ratio, difference, equal_to, ratio
from benchmarks.compare.causes.report import page, write
from benchmarks.compare.causes.timed import _slowest
from benchmarks.compare.command_line import main


def test_a_ratio_is_that_of_pairs():
    """The machine is twice as slow in the second pair, which changes nothing."""
    assert ratio([3.0, 6.0, 2.5], [1.0, 2.0, 1.0]) == Ratio(3.0, 2.5, 3.0)


def test_losses_are_equal_to_a_digit():
    assert equal_to(difference([1.0, 2.0], [1.0, 2.0])) == "the same bits"
    assert equal_to(difference([1.0, 2.0], [1.0, 2.0 + 1e-6])) == "to 1e-6"
    assert difference([2.0, 1.0], [2.0, 1.1]) == pytest.approx(0.1 / 1.1)
    assert difference([1.0], [1.0, 1.0]) == math.inf and equal_to(math.inf) == "not comparable"


def test_a_step_takes_as_long_as_its_slowest_rank():
    assert _slowest([[1.0, 5.0], [2.0, 3.0]]) == [2.0, 5.0]


def test_the_page_has_what_was_measured_and_what_was_not(tmp_path):
    path = tmp_path / "causes.json"
    path.write_text(json.dumps(VALUES))
    write(path)
    text = page(VALUES)
    assert "| throughput | together | in turn (loads 8 x the base instead of 2) |" in text
    assert "| 1.00 | 4.00 for a step | 3 | **4.00** (3.00, 5.00) | to 1e-6 |" in text
    assert "| base resident | 200 | **2.00** | the same bits |" in text
    assert "Not measured: pipelines: needs root." in text
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "words, message", [(["--only", "magic"], "magic"), (["--repeat", "2"], "at least 3")]
)
def test_bad_input(words, message, capsys):
    assert main(["causes", *words]) == 2 and message in capsys.readouterr().out


VALUES = {
    "date": "2026-01-01",
    "machine": {"cores": 2, "processor": "a", "memory_gib": 1.0, "torch": "2", "deepspeed": "0"},
    "quick": False,
    "causes": {
        "loads": {
            **{"of": "throughput", "on": "together", "off": "in turn", "unit": "a step", "command": "run it"},
            **{"median": 4.0, "least": 3.0, "most": 5.0, "losses": "to 1e-6", "model": None},
            **{"seconds": {"on": [1.0, 1.0, 1.0], "off": [3.0, 4.0, 5.0]}, "loaded": {"on": 2.0, "off": 8.0}},
        }
    },
    "memory": {
        "model": {"blocks": 1, "hidden": 2, "vocab": 3, "micro": 4, "rows": 5, "tokens": 6},
        "base": 1 << 20,
        "command": "count it",
        "rows": {
            "everything on": {"peak": 100 << 20, "ratio": 1.0, "losses": "the same bits"},
            "base resident": {"peak": 200 << 20, "ratio": 2.0, "losses": "the same bits"},
        },
    },
    "not_measured": {"pipelines": "needs root"},
}

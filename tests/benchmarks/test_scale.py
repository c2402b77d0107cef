"""What bounds a round, and the page and the plot of `scale`, from points that are made up."""

import json

import pytest

from benchmarks.compare.scale.bounds import bound, fitted_member_s, measured_terms, simulated_terms
from benchmarks.compare.scale.measured import Samples, point
from benchmarks.compare.scale.report import page, write


def terms(training=0.1, exchange=0.1, streams=0.02, link=0.0):
    return measured_terms(10, training, exchange, streams, cores=2, link=link)


def test_what_a_round_waits_for():
    assert bound(1.0, terms(training=0.15, exchange=0.04)) == ("cores (training)", pytest.approx(0.95))
    assert bound(1.0, terms(training=0.05, exchange=0.15))[0] == "cores (messages)"
    assert bound(1.0, terms(training=0.02, exchange=0.15, streams=0.1))[0] == "cores (key streams)"
    assert bound(2.0, terms(link=1.9))[0] == "link (update)"
    assert bound(4.0, terms()) == ("waiting", pytest.approx(0.25))
    assert bound(1.0, simulated_terms(0.2, 0.1, 0.05, 0.6))[0] == "cores (messages)"


def test_key_streams_are_no_more_than_was_measured():
    assert sum(terms(exchange=0.1, streams=9.0).values()) == pytest.approx(10 * 0.2 / 2)


def test_the_fit_finds_what_the_points_were_made_of():
    assert fitted_member_s([(n, n * 5e-3) for n in (4, 16, 64)], 1e-3) == pytest.approx(4e-3)


def test_a_point_is_of_one_client_and_round():
    samples = Samples("no process has this word")
    samples.taken = {
        1: (10.0, 4.0, 2.0, 0),
        2: (11.0, 5.0, 2.5, 80),
        3: (12.0, 6.0, 3.0, 160),
        4: (13.0, 0, 0, 0),
    }
    samples.pss = 200.0
    samples.rss = 400.0
    record = {"seconds": 1.0, "compute_s": 0.5, "exchange_s": 0.25, "idle_s": 0.25, "bytes_sent": 40}
    found = point([record] * 3, samples, 4)
    assert (found["cpu_training_s"], found["cpu_exchange_s"]) == (2 / 8, 1 / 8)
    assert (found["busy_cores"], found["bytes_sent"], found["link_bytes"]) == (1.5, 10, 20)
    assert (found["pss"], found["rss"]) == (200, 400)


def test_measured_and_simulated_stay_apart(tmp_path):
    path = tmp_path / "scale.json"
    path.write_text(json.dumps(VALUES))
    write(path)
    text = page(VALUES)
    measured, checked, simulated = text.split("## ")[1:]
    assert "| processes | mix+mask | 4 | 2.00 |" in measured and "9,999" not in measured
    assert "| 1210 | 1815 | +50% | 0.100 | 0.050 | -50% |" in checked
    assert simulated.count("9,999") == 2 and "processes" not in simulated
    assert "Not measured: hosts: needs root." in measured
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


VALUES = {
    "date": "2026-01-01",
    "machine": {"cores": 2, "processor": "a", "memory_gib": 1.0, "torch": "2", "deepspeed": "0"},
    "update_bytes": [315_000],
    "measured": [
        {
            **dict.fromkeys(("compute_s", "exchange_s", "idle_s", "cpu_training_s"), 0.5),
            **{"kind": "processes", "mode": "mix+mask", "clients": 4, "seconds": 2.0, "busy_cores": 1.9},
            **{"cpu_exchange_s": 0.1, "bytes_sent": 1.21e6, "link_bytes": None, "pss": 1e8, "rss": 4e8},
            **{"bound": "cores (training)", "bound_share": 0.9, "update_bytes": 315_000},
        }
    ],
    "not_measured": {"hosts": "needs root"},
    "formula": [{"clients": 4, "mode": "mix+mask", "sent": 1.815e6, "cpu": 0.05, "streams": 0.01}],
    "fitted_member_s": 0.004,
    "member_s": 0.003,
    "simulated_model": "a model",
    "simulated": [
        {
            **{"clients": 9_999, "train": 5.0, "plain": 1.0, "plain_sent": 1e7, "plain_cpu": 0.5},
            **{"masked": 6.0, "sent": 2e7, "masked_cpu": 5.0, "round": 11.0, "hidden": 6.0},
            **{"plain_bound": "device (training)", "masked_bound": "cores (messages)"},
        }
    ],
}

"""`fedspeed bench outside`: environments, what counts as a round, what makes a result right, its page."""

import json

import pytest

from benchmarks.compare.outside import CHOICES
from benchmarks.compare.outside.environments import STAMP, Environment, interpreter, key_of, made
from benchmarks.compare.outside.measuring import environment, failure, rounds_of
from benchmarks.compare.outside.network import sent_bytes
from benchmarks.compare.outside.page import draw, page, text_table
from benchmarks.compare.outside.progress import Progress
from benchmarks.compare.outside.rows import judged, problems
from benchmarks.compare.outside.system import Site
from benchmarks.compare.outside.systems import OTHERS, chosen
from benchmarks.compare.outside.systems.roundpipe import where_and_what
from benchmarks.compare.outside.task import settings
from benchmarks.compare.processes import Watched

LOSSES = [5.5, 5.25, 5.125, 5.0625, 5.0]


def run_of(losses=LOSSES, seconds=2.0):
    """Return a made-up run."""
    rounds = [seconds, seconds, seconds + 1, seconds - 1]
    times = {"first_aggregate_s": 8.0, "rounds_s": rounds, "total_s": 20.0}
    return {**times, "rss_mb": 900.0, "pss_mb": 600.0, "loopback_mb": 1.5, "losses": list(losses)}


def row_of(name, runs, *, reference=False, task="three-clients"):
    """Return a made-up row without its verdict."""
    about = {"package": name, "version": "1", "packages": 3, "install_s": None if reference else 40.0}
    return {"name": name, "system": name, "task": task, "reference": reference, **about, "runs": runs}


def result_of(*rows):
    """Return a made-up result, with rows that are judged by the first."""
    machine = {"cores": 2, "processor": "a processor", "memory_gib": 1.0, "torch": "2"}
    left_out = [{"system": "pipe", "reason": "ValueError: no card", "elsewhere": "python -m benchmarks.gpu"}]
    return {
        "date": "2026-01-01",
        "machine": machine,
        "task": settings(),
        "repeat": 1,
        "tolerance": 1e-5,
        "isolated": True,
        "rows": [judged(row, rows[0]) for row in rows],
        "left_out": left_out,
    }


def test_an_environment_is_known_by_what_is_installed_in_it(tmp_path):
    key = key_of([["a==1", "b==2"], ["c==3"]])
    assert key == key_of((("a==1", "b==2"), ("c==3",)))
    assert key not in {key_of([["a==1", "b==2", "c==3"]]), key_of([["a==1", "b==3"], ["c==3"]])}
    assert made(tmp_path, key) is None
    stamp = {"key": key, "seconds": 3.5, "packages": 7, "version": "1.0"}
    (tmp_path / STAMP).write_text(json.dumps(stamp))
    assert made(tmp_path, key) is None  # its interpreter is gone
    interpreter(tmp_path).parent.mkdir()
    interpreter(tmp_path).touch()
    assert made(tmp_path, key) == Environment(**stamp)
    assert made(tmp_path, "another") is None
    (tmp_path / STAMP).write_text("{")
    assert made(tmp_path, key) is None


def test_every_system_can_be_named_and_has_pinned_packages(tmp_path):
    assert tuple(system.name for system in OTHERS) == CHOICES
    assert [system.name for system in chosen(("nvflare",))][-2:] == ["fedspeed-one-client", "nvflare"]
    for system in OTHERS:
        first = [text for text in system.installs[0] if text.lower().startswith(system.package)]
        assert all("==" in text for text in first) and len(first) == 1
    site = Site(tmp_path / "bin" / "python", tmp_path / "task", tmp_path / "run")
    for variant in (variant for system in chosen(CHOICES) for variant in system.variants):
        command = variant.command(site)
        assert command[0].startswith(str(tmp_path / "bin")) and any(
            str(tmp_path / "task") in c for c in command
        )


def test_a_run_sees_our_code_and_writes_in_its_own_folder(tmp_path):
    outer = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "KEPT": "1"}
    found = environment(outer, {"OWN": "2"}, tmp_path / "env" / "bin" / "python", tmp_path)
    assert found["PATH"] == f"{tmp_path}/env/bin:/bin" and found["HOME"] == str(tmp_path)
    assert found["KEPT"] == "1" and found["OWN"] == "2" and "OMP_NUM_THREADS" not in found


def test_rounds_are_found_among_what_systems_print():
    def line(number, loss):
        return json.dumps({"event": "round", "round": number, "val_loss": loss})

    printed = [
        (0.5, "INFO {not json}"),
        (0.6, '{"event": "plan"}'),
        (0.7, "[1, 2]"),
        (1.0, line(1, 5.5)),
        (1.1, f"log: {line(1, 9.9)}"),  # the same line again, through a log
        (2.0, f"(actor) {line(2, 5.0)}"),
        (4.0, line(4, 4.0)),  # without the third
    ]
    assert rounds_of(printed) == ([1.0, 2.0], [5.5, 5.0])


def test_why_a_run_does_not_count():
    def watched(code, errors=""):
        return Watched(code, 9.0, (), rss=1, pss=1, errors=errors)

    assert failure(watched(0), 5, 60) == ""
    assert failure(watched(None), 2, 60) == "did not end within 60 s, and was killed after 2 of 5 rounds: "
    assert (
        failure(watched(3, "a\nb\nc\nd\n"), 0, 60) == "ended with exit code 3 after 0 of 5 rounds: b | c | d"
    )
    assert failure(watched(0), 4, 60).startswith("ended without error after 4 of 5 rounds")


def test_bytes_over_the_loopback():
    table = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls
    lo: 1234 10 0 0 0 0 0 0 5678 11 0 0 0 0 0 0
"""
    assert sent_bytes(table) == 5678


def test_losses_make_a_result_right_or_wrong():
    plain = row_of("plain", [run_of()], reference=True)
    near = row_of("near", [run_of([*LOSSES[:4], 5.0 + 9e-6]), run_of(seconds=4.0)])
    far = row_of("far", [run_of(), run_of([5.5 + 2e-5, *LOSSES[1:]])])
    lost = row_of("lost", [run_of(), {"failed": "it hung"}])
    found = judged(near, plain)
    assert found["verdict"] == "equal" and found["largest_difference"] == pytest.approx(9e-6)
    assert found["round_s"] == {"median": 3.0, "min": 1.0, "max": 5.0}
    assert judged(far, plain)["verdict"] == "wrong"
    assert judged(lost, plain)["verdict"] == "failed"
    assert judged(near, row_of("plain", [{"failed": "x"}], reference=True))["verdict"] == "not compared"
    assert judged(row_of("nan", [run_of([float("nan"), *LOSSES[1:]])]), plain)["verdict"] == "wrong"


def test_the_form_of_a_result_is_checked():
    plain = row_of("plain", [run_of()], reference=True)
    result = result_of(plain, row_of("peer", [run_of()]))
    assert problems(result) == []
    assert problems({**result, "rows": None}) == ["rows: not list"]
    short = json.loads(json.dumps(result))
    short["rows"][1]["runs"][0]["losses"].pop()
    short["rows"][0]["runs"][0]["rss_mb"] = 0
    del short["left_out"][0]["reason"]
    assert problems(short) == [
        "rows[0]: runs[0]: a measure is not positive",
        "rows[1]: runs[0]: not 5 rounds",
        "left_out[0]: without reason",
    ]
    claimed = json.loads(json.dumps(result))
    claimed["rows"][1]["largest_difference"] = 0.1
    assert problems(claimed) == ["rows[1]: equal, but its losses differ"]


def test_table_page_and_plot_of_a_result(tmp_path):
    plain = row_of("plain", [run_of()], reference=True)
    result = result_of(
        plain,
        row_of("peer", [run_of(seconds=3.0)]),
        row_of("wrong one", [run_of([9.0] * 5)]),
        row_of("lost one", [{"failed": "it hung"}]),
    )
    lines = text_table(result["rows"]).splitlines()
    assert lines[1].startswith("medians of 1") and "3.00 (1.50)" in lines[4] and "5.000000 equal" in lines[4]
    assert lines[6].split(" failed: ") == [f"{'lost one':48}", "it hung"]
    text = page(result)
    assert "| peer | peer 1, 3 | 8.0 | 3.00 (2.00 to 4.00) | 20.0 | 900 | 600 | 1.5 | 5.000000, equal" in text
    assert "| lost one | lost one 1, 3 | | | | | | | failed |" in text
    assert "wrong (to 4.0e+00)" in text and "    ValueError: no card" in text
    assert all(len(line) <= 110 for line in text.splitlines() if not line.startswith("|"))
    draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_command_goes_on(tmp_path, capsys):
    path = tmp_path / "runs.json"
    first = Progress(path, "key", 3)
    assert first.run("a", 0, run_of) == run_of()
    first.run("b", 0, lambda: {"failed": "it hung"})
    again = Progress(path, "key", 3)
    measured = []
    for name in ("a", "b"):
        again.run(name, 0, lambda: measured.append(1) or run_of(seconds=9.0))
    assert len(measured) == 1  # b only: it had failed
    assert "[2/3] b #1: failed: it hung" in capsys.readouterr().out
    Progress(path, "another key", 3).run("a", 0, lambda: measured.append(1) or run_of())
    assert len(measured) == 2
    again.forget()
    assert not path.exists()


def test_what_a_package_says_when_it_cannot_be_imported():
    traceback = """Traceback (most recent call last):
  File "<string>", line 1, in <module>
  File "device.py", line 349, in get_min_gpu_memory
    return min(avail_mem)
ValueError: min() arg is an empty sequence
"""
    found = where_and_what(traceback)
    assert found == "ValueError: min() arg is an empty sequence (in get_min_gpu_memory)"
    assert where_and_what("") == "no message"

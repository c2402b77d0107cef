"""The six golden runs reproduce their recorded values digit by digit, and the comparison detects a
difference.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import GOLDEN, SUITE, VALUES
from tests.golden_run import Failed, steps_of
from tests.golden_values import Recorded, differences
from tests.limits import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checked() -> subprocess.CompletedProcess:
    """Return the output of `python tests/golden.py check` for the six runs."""
    command = [sys.executable, "tests/golden.py", "check", *SUITE]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.parametrize("name", SUITE)
def test_a_golden_run_gives_what_it_gave(checked, name):
    assert re.search(rf"^{name}: equal \[", checked.stdout, re.M), checked.stdout + checked.stderr


def test_all_golden_runs_are_recorded():
    assert list(Recorded.read(VALUES).runs) == list(GOLDEN)


def test_a_difference_is_reported_with_both_values():
    old = {
        "rounds": [{"train_loss": 5.0, "tokens": 8, "update_norm": 0.5}],
        "adapter": {"a": "00"},
        "summary": {"rounds": 1},
    }

    def differing(near: float, **changed) -> list[str]:
        return differences(old, {**old, **changed}, near)

    assert differing(0.0) == []
    near = [{"train_loss": 5.0001, "tokens": 8, "update_norm": 0.501}]
    assert differing(0.0, rounds=near)[0] == "rounds[0].train_loss: expected 5.0, found 5.0001"
    assert differing(1e-4, rounds=near, adapter={"a": "11"}) == []
    assert differing(0.0, adapter={"a": "11"}) == ['adapter.a: expected "00", found "11"']
    far = [{"train_loss": 5.01, "tokens": 9, "update_norm": 0.6}]
    assert len(differing(1e-4, rounds=far)) == 3
    assert differing(1e-4, rounds=[]) == ["rounds: expected 1 entries, found 0"]
    assert differing(1e-4, adapter={"b": "00"}) == [
        'adapter.a: expected "00", found nothing',
        'adapter.b: expected nothing, found "00"',
    ]
    assert differing(0.0, summary={"rounds": 1.0}) and differing(0.0, summary={"rounds": True})


def test_values_are_read_as_they_were_written(tmp_path):
    run = {"exit_codes": [0], "rounds": [{"lr": 0.1, "missing": []}], "adapter": {}}
    values = Recorded({"fp32": "a"}, "versions", {"run": run})
    values.write(tmp_path / "values.json")
    assert Recorded.read(tmp_path / "values.json") == values
    (tmp_path / "values.json").write_text("{}")
    with pytest.raises(ValueError, match="values.json: not a file of golden values .*record it anew"):
        Recorded.read(tmp_path / "values.json")


def test_steps_that_were_taken_again_count_once_and_must_be_the_same(tmp_path):
    lines = [
        '{"process": 1, "round": 1, "loss": 2.5}',
        '{"process": 1, "round": 2, "loss": 2.25}',
        '{"process": 2, "round": 2, "loss": 2.25}',
        '{"process": 2, "round": 2, "loss": NaN}',
    ]
    (tmp_path / "steps-0.jsonl").write_text("\n".join(lines))
    found = steps_of(tmp_path)["rank 0"]
    assert found["round 1"] == [2.5] and repr(found["round 2"]) == "[2.25, nan]"
    (tmp_path / "steps-0.jsonl").write_text("\n".join([*lines, '{"process": 3, "round": 2, "loss": 2.0}']))
    with pytest.raises(Failed, match="rank 0, round 2: losses .*2.25, nan.* before a restart, and .*2.0"):
        steps_of(tmp_path)

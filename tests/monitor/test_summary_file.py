import math

import pytest

from fedspeed.errors import EXIT_USAGE, JournalError
from fedspeed.monitor.records import MissingUpdates, summarise
from fedspeed.monitor.summary_file import read_summary, write_summary


def test_what_is_written_is_read_back(tmp_path, make_round):
    assert read_summary(tmp_path) is None
    summary = summarise(
        [make_round(1, received=1, missing=(0, 2)), make_round(2, val_loss=-math.inf)],
        status="early stop",
        total_rounds=5,
        reason="no better held-out loss",
        exit_code=1,
        restarts=2,
        also_missing=(MissingUpdates(3, 1),),
        absent=(0,),
    )
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"status": "finished"}'])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, damage):
    (tmp_path / "summary.json").write_bytes(damage)
    with pytest.raises(JournalError, match="summary.json: not the summary of a run .*Move it away") as caught:
        read_summary(tmp_path)
    assert caught.value.exit_code == EXIT_USAGE

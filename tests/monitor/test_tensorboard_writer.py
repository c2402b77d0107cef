import logging
import math
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedspeed.monitor.tensorboard import TensorBoardWriter, scalars
from tests.limits import LIMIT_S


def write(folder, records, resume_after_round=0, mode="plain", config="run:\n  seed: 0\n"):
    writer = TensorBoardWriter(folder, resume_after_round, mode, config)
    for record in records:
        writer.round(record)
    return writer


def read(folder):
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports each purge as a warning
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def series(events, tag):
    return [(item.step, item.value) for item in events.Scalars(tag)]


def test_tags_and_values_over_rounds(tmp_path, make_round, make_client):
    write(
        tmp_path,
        [make_round(1, per_client=(make_client(7),)), make_round(2, val_loss=None, factor_error=None)],
    ).close()
    events = read(tmp_path)
    assert series(events, "loss/train") == [(1, 1.5), (2, 1.0)]
    assert series(events, "loss/held_out") == [(1, pytest.approx(1.6))]
    assert series(events, "memory/peak_gib") == [(1, 2.0), (2, 2.0)]
    assert series(events, "seconds/compute") == [(1, 6.0), (2, 6.0)]
    assert series(events, "client_7/loss/held_out") == [(1, 9.5)]
    assert {tag for tag in events.Tags()["scalars"] if not tag.startswith("client_")} == {
        "loss/train",
        "loss/held_out",
        "speed/tokens_per_s",
        "memory/peak_gib",
        "network/bytes_sent",
        "seconds/compute",
        "seconds/gather",
        "seconds/exchange",
        "seconds/idle",
        "seconds/round",
        "federation/factor_error",
        "federation/update_norm",
        "federation/learning_rate",
        "federation/updates_received",
    }
    assert b"    run:\n      seed: 0\n" in events.Tensors("config")[0].tensor_proto.string_val[0]


def test_a_round_is_readable_while_the_run_goes_on(tmp_path, make_round):
    writer = write(tmp_path, [make_round(1)])
    assert series(read(tmp_path), "loss/train") == [(1, 1.5)]
    writer.close()


def test_resume_leaves_no_round_twice(tmp_path, make_round):
    write(
        tmp_path, [make_round(number, train_loss=float(number), per_client=()) for number in range(1, 6)]
    )  # killed: never closed
    write(
        tmp_path,
        [make_round(number, train_loss=number + 0.5, val_loss=None) for number in (4, 5, 6)],
        resume_after_round=3,
    ).close()
    events = read(tmp_path)
    assert series(events, "loss/train") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert [step for step, _ in series(events, "loss/held_out")] == [1, 2, 3]
    assert len(events.Tensors("config")) == 1


def test_resume_after_a_crash_in_the_middle_of_a_record(tmp_path, make_round):
    write(tmp_path, [make_round(number) for number in (1, 2, 3)]).close()
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-40])
    write(tmp_path, [make_round(number, train_loss=9.0) for number in (3, 4)], resume_after_round=2).close()
    assert series(read(tmp_path), "loss/train") == [(1, 1.5), (2, 1.0), (3, 9.0), (4, 9.0)]


def test_a_fresh_start_in_an_old_folder_removes_what_was_there(tmp_path, make_round):
    (tmp_path / "events.out.tfevents.1.elsewhere").write_bytes(b"")
    write(tmp_path, [make_round(number) for number in (0, 1, 2, 3)], config="old: 1").close()
    write(tmp_path, [make_round(number, train_loss=5.0) for number in (0, 1)], config="new: 1").close()
    events = read(tmp_path)
    assert series(events, "loss/train") == [(0, 5.0), (1, 5.0)]
    assert [item.tensor_proto.string_val[0] for item in events.Tensors("config")] == [b"    new: 1\n"]
    assert (tmp_path / "events.out.tfevents.1.elsewhere").exists()


def test_a_clock_that_went_back_does_not_change_the_order(tmp_path, make_round, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 2e9)
    write(tmp_path, [make_round(1, train_loss=1.0), make_round(2, train_loss=2.0)]).close()
    monkeypatch.setattr("time.time", lambda: 1e9)
    write(tmp_path, [make_round(2, train_loss=7.0)], resume_after_round=1).close()
    assert series(read(tmp_path), "loss/train") == [(1, 1.0), (2, 7.0)]


def test_a_diverged_loss_is_shown_as_such(tmp_path, make_round):
    write(tmp_path, [make_round(1, train_loss=math.nan)]).close()
    assert math.isnan(series(read(tmp_path), "loss/train")[0][1])


def test_masked_modes_have_no_client_tags(tmp_path, make_round, make_client):
    write(tmp_path, [make_round(1, per_client=(make_client(0), make_client(1)))], mode="masked").close()
    tags = read(tmp_path).Tags()["scalars"]
    assert "loss/train" in tags
    assert not [tag for tag in tags if tag.startswith(("client_", "memory/"))]


def test_held_out_answers_exactly_right_of_all_and_of_each(make_round, make_client):
    values = scalars(make_round(1, val_exact=0.25, per_client=(make_client(7, val_exact=0.5),)))
    assert (values["accuracy/held_out_exact"], values["client_7/accuracy/held_out_exact"]) == (0.25, 0.5)


def test_what_was_not_measured_has_no_value(make_round):
    values = scalars(
        make_round(1, train_loss=None, val_loss=None, peak_bytes=None, factor_error=None, update_norm=None)
    )
    assert None not in values.values()
    assert (
        not {
            "loss/train",
            "loss/held_out",
            "memory/peak_gib",
            "federation/factor_error",
            "federation/update_norm",
        }
        & values.keys()
    )


def test_writing_events_needs_no_torch(tmp_path):
    code = (
        "import sys; from fedspeed.monitor.tensorboard import TensorBoardWriter; "
        f"TensorBoardWriter({str(tmp_path)!r}, 0, 'plain', 'a: 1').close(); "
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)

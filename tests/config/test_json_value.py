"""JSON that users write: whatever is wrong with it is a message that names the file, never a traceback."""

import pytest

from fedspeed.config.deepspeed import merge
from fedspeed.config.run import RunConfig
from fedspeed.errors import FedSpeedError
from fedspeed.files import json_value
from fedspeed.models.catalogue import shape_of
from fedspeed.routing.identity import read_card
from fedspeed.session.planner_inputs import read_probe_file

LONG = '{"number": -' + "7" * 5000 + "}"  # Python converts up to 4300 digits


def test_what_json_holds():
    assert json_value('{"a": [1, -2, 3e2, null]}') == {"a": [1, -2, 300.0, None]}
    assert json_value(b"12" + b"0" * 4000) == 12 * 10**4000
    assert json_value('{"a": 1, "a": 2}', object_pairs_hook=len) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LONG, "a whole number of 5001 digits, -77777777777"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "line 1 column 2"),
        (b"\xff", "utf-8"),
    ],
)
def test_every_fault_is_a_value_error(text, words):
    with pytest.raises(ValueError, match=words):
        json_value(text)


def deepspeed_base(path):
    return merge({"base": path.name}, RunConfig(), path.parent)


@pytest.mark.parametrize("text", [LONG, "[" * 100_000], ids=["digits", "depth"])
@pytest.mark.parametrize(
    "reader",
    [deepspeed_base, lambda path: shape_of(str(path.parent)), read_card, read_probe_file],
    ids=["deepspeed.base", "config.json", "card", "probe"],
)
def test_each_reader_names_the_file(tmp_path, reader, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(FedSpeedError, match="whole number of 5001 digits|nested too deeply") as error:
        reader(path)
    assert str(path) in str(error.value)

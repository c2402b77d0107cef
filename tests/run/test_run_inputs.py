"""A resumed run continues with the inputs that it began with; if one has changed, the refusal names it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.load import load
from fedspeed.data.clients import client_rows
from fedspeed.errors import JournalError
from fedspeed.models import file_digests
from fedspeed.routing import identity
from fedspeed.session import input_digests
from fedspeed.session.dry_run import dry_run
from fedspeed.session.input_digests import check_inputs, rows_without_libraries
from fedspeed.session.request import RunRequest
from fedspeed.session.resume import journal_entry
from tests.run.launched import LLAMA, SETTINGS, last_round

ROUNDS = SETTINGS["federation"]["rounds"]
ROWS = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(40)]


def write_json(path: Path, content) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def edit(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def project(tmp_path):
    """Write the files of a run, of which the tested code reads only names and contents."""
    write_json(tmp_path / "base" / "config.json", LLAMA)
    save_file({"w": np.arange(6.0)}, tmp_path / "base" / "model.safetensors")
    write_json(tmp_path / "base" / "tokenizer.json", {"model": 1})
    write_json(tmp_path / "start" / "adapter_config.json", {"r": 8})
    save_file({"a": np.ones(3)}, tmp_path / "start" / "adapter_model.safetensors")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.yaml").write_text(
        "model: {base: base}\nadapter: {start_from: start}\n"
        "data: {task: file, path: rows.jsonl, clients: 2}\n"
    )
    return tmp_path


class Run:
    """Hold the journal of a run that has begun, and start it again."""

    def __init__(self, project: Path, **kept):
        self.order = RunRequest(load(project / "run.yaml", [f"run.out={project / 'runs'}"]))
        self.journal = Journal(self.order.folder, 2)
        record = (
            self.order.record | {"inputs": input_digests.journal_digests(self.order.config, self.rows)} | kept
        )
        self.journal.commit(
            Entry(3, self.order.fingerprint, 0, record), {"global/w": np.zeros(2, np.float32)}
        )

    @property
    def rows(self):
        return client_rows(self.order.config.data, 0)

    def go_on(self) -> list[str]:
        return check_inputs(
            self.journal, journal_entry(self.journal, self.order), self.order.config, self.rows
        )


def other_weights(project):
    save_file({"w": np.arange(6.0) + 1e-9}, project / "base" / "model.safetensors")


def more_weights(project):
    save_file({"w": np.arange(6.0)}, project / "base" / "model-2.safetensors")


def other_adapter(project):
    save_file({"a": np.zeros(3)}, project / "start" / "adapter_model.safetensors")


def other_row(project):
    write_rows(project, ROWS[:-1] + [{"instruction": "say 39", "output": "40"}])


def other_order(project):
    write_rows(project, ROWS[1:] + ROWS[:1])


HELD_OUT = [
    {"messages": [{"role": role, "content": f"{n}"} for role in ("user", "assistant") * 2]} for n in range(3)
]


def changed_conversation(project, number: int, **changes) -> None:
    """Write the held-out conversations, one of which has other fields in one message."""
    messages = [dict(message) for message in HELD_OUT[1]["messages"]]
    messages[number] |= changes
    write_held_out(project, [HELD_OUT[0], {"messages": messages}, HELD_OUT[2]])


def write_held_out(project, rows):
    (project / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "change",
    [
        lambda project: changed_conversation(project, 0, content="?"),
        lambda project: changed_conversation(project, 1, weight=0),
        lambda project: changed_conversation(project, 2, role="system"),
        lambda project: write_held_out(project, HELD_OUT[:2]),
        lambda project: write_held_out(project, HELD_OUT[::-1]),
        lambda project: write_held_out(project, [{"text": "3"}]),
    ],
    ids=["first message", "weight", "role", "fewer", "order", "format"],
)
def test_another_held_out_conversation_is_noticed(project, change):
    write_held_out(project, HELD_OUT)
    configuration = project / "run.yaml"
    configuration.write_text(
        configuration.read_text().replace("clients: 2", "clients: 2, held_out: held_out.jsonl")
    )
    run = Run(project)
    assert run.go_on() == []
    change(project)
    with pytest.raises(JournalError, match="the rows of data.path=.* and of data.held_out=.*held_out.jsonl"):
        run.go_on()


def test_how_a_row_was_written_changes_the_digest_only_where_the_tokens_differ(project):
    def digest(name, record):
        path = project / name
        path.write_text((json.dumps(record) + "\n") * 2)
        config = load(project / "run.yaml", ["data.clients=1", f"data.path={path}"]).config
        return input_digests.digests(config, client_rows(config.data, 0))[input_digests.ROWS]

    pair = {"prompt": "p", "completion": "c"}
    chat = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}
    instruction = {"instruction": "p", "output": "c"}
    text = {"text": "c"}
    digests = [digest(f"{i}.jsonl", record) for i, record in enumerate((pair, chat, instruction, text))]
    assert digests[1] == digests[2] and len(set(digests)) == 3


def write_rows(project, rows):
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda project: edit(project / "base" / "config.json", rope_theta=1e6),
            "the config.json of model.base",
        ),
        (
            lambda project: edit(project / "base" / "config.json", model_type="qwen2"),
            "the config.json of model.base",
        ),
        (other_weights, "the weights of model.base="),
        (more_weights, "the weights of model.base="),
        (lambda project: edit(project / "base" / "tokenizer.json", model=2), "the tokenizer in "),
        (lambda project: write_json(project / "base" / "added_tokens.json", {}), "the tokenizer in "),
        (lambda project: write_json(project / "base" / "vocab.txt", {}), "the tokenizer in "),
        (lambda project: write_json(project / "base" / "chat_template.jinja", {}), "the tokenizer in "),
        (
            lambda project: edit(project / "start" / "adapter_config.json", r=4),
            "the adapter in adapter.start_from=",
        ),
        (other_adapter, "the adapter in adapter.start_from="),
        (other_row, "the rows of data.path="),
        (other_order, "the rows of data.path="),
    ],
    ids=[
        "config",
        "family",
        "weights",
        "shards",
        "tokenizer",
        "tokens",
        "vocabulary",
        "chat template",
        "adapter config",
        "adapter",
        "row",
        "split",
    ],
)
def test_what_has_changed_is_named(project, change, named):
    run = Run(project)
    assert run.go_on() == []
    change(project)
    with pytest.raises(JournalError, match="changed since its round 3: ") as error:
        run.go_on()
    text = str(error.value)
    assert all(part in text for part in (str(run.journal.folder), named, "run.name=", "--fresh"))
    inputs_named = [
        name for name in ("config.json", "weights", "tokenizer", "adapter", "rows") if f"the {name} " in text
    ]
    assert inputs_named == [named.split()[1]], "only what has changed"


def test_what_changes_nothing_is_no_change(project):
    """Copied or rewritten files, keys that name an author, and files that the run does not read do not count
    as changes.
    """
    run = Run(project)
    edit(project / "base" / "config.json", transformers_version="9.9", _name_or_path="elsewhere")
    for path in (project / "base" / "model.safetensors", project / "rows.jsonl"):
        path.write_bytes(path.read_bytes())
    write_json(project / "base" / "generation_config.json", {})
    assert run.go_on() == []


def test_a_large_file_counts_with_size_header_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "WHOLE_BYTES", 1 << 10)
    monkeypatch.setattr(file_digests, "SAMPLE_BYTES", 16)
    path = tmp_path / "model.safetensors"
    content = bytearray(10_000)
    path.write_bytes(content)
    digest = file_digests.files_digest([path])
    for at in (3, 9_999, (10_000 - 16) * 10 // 63):
        content[at] ^= 1
        path.write_bytes(content)
        assert file_digests.files_digest([path]) != digest
        content[at] ^= 1
    path.write_bytes(content + b"0")
    assert file_digests.files_digest([path]) != digest
    path.write_bytes(content)
    assert file_digests.files_digest([path]) == digest


def test_what_is_not_to_be_had_is_not_compared(project):
    """A hub name that is not downloaded and rows that cannot be read are reported by the code that needs
    them.
    """
    run = Run(project)
    (project / "rows.jsonl").write_text("{\n")
    assert rows_without_libraries(run.order.config) is None
    assert check_inputs(run.journal, journal_entry(run.journal, run.order), run.order.config, None) == []
    (project / "run.yaml").write_text("model: {base: no-owner/no-name}\n")
    assert input_digests.digests(load(project / "run.yaml").config, None) == {}


def test_a_shipped_base_counts_with_its_content(project):
    (project / "run.yaml").write_text("model: {base: gpt3-125m, init: random, tokenizer: bytes}\n")
    assert input_digests.digests(load(project / "run.yaml").config, None).keys() == {"base config"}


@pytest.fixture
def organisation(project):
    """Return the same files, of an organisation that has a key."""
    identity.make("north", "127.0.0.1:1", project / "keys")
    (project / "run.yaml").write_text(
        "model: {base: base, dtype: fp32}\ndata: {task: file, path: rows.jsonl, clients: 1}\n"
        "routing: {transport: tls, identity: keys/north.key, roster: roster.json}\n"
    )
    return project


def test_an_organisations_journal_does_not_tell_which_rows_it_belongs_to(organisation):
    """Somebody who receives the journal knows everything but the key, so that it must not hold the digest of
    a correct guess.
    """
    run = Run(organisation)
    kept = json.loads(next(run.journal.folder.rglob("entry.json")).read_text())["config"]["inputs"]
    guessed = input_digests.digests(run.order.config, run.rows)
    assert guessed.pop("rows") not in kept.pop("rows") and kept == guessed
    assert run.go_on() == []
    other_row(organisation)
    with pytest.raises(JournalError, match="the rows of data.path="):
        run.go_on()


def test_rows_that_were_noted_with_another_key_pass_and_are_reported(organisation):
    """A key may be rotated during a run, and journals of earlier versions were written without one."""
    run = Run(organisation)
    (organisation / "keys" / "north.key").unlink()
    (organisation / "keys" / "north.json").unlink()
    identity.make("north", "127.0.0.1:1", organisation / "keys")
    (note,) = run.go_on()
    assert "routing.identity=" in note and "since round 3 is not known" in note
    other_weights(organisation)
    with pytest.raises(JournalError, match="changed since its round 3: the weights of ") as error:
        run.go_on()
    assert "the rows" not in str(error.value)


def test_a_journal_of_an_earlier_version_passes_and_is_reported(project):
    (note,) = Run(project, inputs={}).go_on()
    assert "is of an earlier version" in note and "since round 3 is not known" in note


def test_a_journal_without_a_digest_of_all_files_of_the_tokenizer_goes_on(project):
    """Earlier versions had one of seven files: it is the same as before."""
    write_json(project / "base" / "vocab.txt", {})
    run = Run(project)
    path = next(run.journal.folder.rglob("entry.json"))
    entry = json.loads(path.read_text())
    inputs = entry["config"]["inputs"]
    assert inputs.pop("more of the tokenizer") != "none"
    assert inputs["tokenizer"] == file_digests.files_digest([project / "base" / "tokenizer.json"])
    path.write_text(json.dumps(entry))
    assert run.go_on() == []
    edit(project / "base" / "tokenizer.json", model=2)
    with pytest.raises(JournalError, match="the tokenizer in "):
        run.go_on()


def test_a_run_with_a_changed_base_is_refused_before_it_starts(workshop, copy_of_whole):
    """The supervisor and the dry run refuse it, also if the run is complete."""
    run = copy_of_whole("rebased")
    kept = json.loads((last_round(run) / "entry.json").read_text())["config"]["inputs"]
    assert kept.keys() == {"base config", "rows"}, "weights are drawn, and the tokenizer is built in"
    path = workshop.folder / "model" / "config.json"
    before = path.read_text()
    edit(path, rope_theta=5e5)
    try:
        for arguments in ((), ("federation.rounds=9",)):
            ended = workshop.run("run.name=rebased", *arguments)
            assert ended.code == 2 and "Traceback" not in ended.text
            base = workshop.folder / "model"
            assert f"since its round {ROUNDS}: the config.json of model.base={base}. Restore" in ended.err
        with pytest.raises(JournalError, match="the config.json of model.base"):
            dry_run(RunRequest(load(workshop.config, ["run.name=rebased"])))
    finally:
        path.write_text(before)


def test_an_earlier_versions_journal_goes_on_and_keeps_the_inputs_from_then_on(workshop, copy_of_whole):
    run = copy_of_whole("earlier")
    path = last_round(run) / "entry.json"
    entry = json.loads(path.read_text())
    expected = entry["config"].pop("inputs")
    path.write_text(json.dumps(entry))
    ended = workshop.finish_run("run.name=earlier", f"federation.rounds={ROUNDS + 1}", "monitor.plot=false")
    assert "is of an earlier version" in ended.err
    assert json.loads((last_round(run) / "entry.json").read_text())["config"]["inputs"] == expected


def test_a_signal_while_files_are_checked_is_no_fault_of_theirs():
    from fedspeed.errors import FedSpeedError, Preempted
    from fedspeed.session import preflight

    def stop_requested(loaded):
        raise Preempted("asked to end")

    def faulty(loaded):
        raise FedSpeedError("a fault")

    with pytest.raises(Preempted):
        preflight._all((faulty, stop_requested), None)

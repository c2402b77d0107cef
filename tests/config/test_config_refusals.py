"""Configuration files and overrides that the loader refuses, each with its place and a remedy."""

import pytest

from fedspeed.config.load import FIELDS
from fedspeed.config.names import FORMER_KEYS
from tests.config.loading import BASE, problems_of, write


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=fast", "train.lr is 'fast', but must be a number, at least 0"),
        ("train.lr=-1", "train.lr is -1, but must be a number, at least 0"),
        ("train.lr=.inf", "train.lr is .inf, but must be a number"),
        ("train.lr=.nan", "train.lr is .nan, but must be a number"),
        ("train.lr=true", "train.lr is true, but must be a number"),
        ("train.lr=", "train.lr is '', but must be a number"),
        ("train.lr=null", "train.lr is null, but must be a number"),
        ("train.lr=[1]", "train.lr is a list, but must be a number"),
        ("train.lr={a: 1}", "train.lr is a section, but must be a number"),
        ("train.lr.a=1", "train.lr is a section, but must be a number"),
        ("train.lr='1'", "train.lr is '1', but must be a number"),
        ("train.beta1=1", "train.beta1 is 1, but must be a number, at least 0 and below 1"),
        ("federation.server_lr=0", "federation.server_lr is 0, but must be auto or a number, above 0"),
        (
            "federation.server_lr=-.inf",
            "federation.server_lr is -.inf, but must be auto or a number, above 0",
        ),
        (
            "federation.server_lr=atuo",
            "federation.server_lr is 'atuo', but must be auto or a number, above 0",
        ),
        (
            "data.val_fraction=0.95",
            "data.val_fraction is 0.95, but must be a number, at least 0 and at most 0.9",
        ),
        ("train.micro_batch=2.0", "train.micro_batch is 2.0, but must be a whole number, at least 1"),
        ("train.micro_batch=1e1", "train.micro_batch is 1e1, but must be a whole number"),
        ("train.micro_batch=0", "train.micro_batch is 0, but must be a whole number, at least 1"),
        ("train.micro_batch=true", "train.micro_batch is true, but must be a whole number"),
        (f"train.micro_batch={'9' * 5000}", "but must be a whole number, at least 1"),
        ("train.micro_batch=!!int x", "the tag 'tag:yaml.org,2002:int' does not fit here"),
        ("monitor.plot=yes", "monitor.plot is 'yes', but must be true or false"),
        ("monitor.plot=1", "monitor.plot is 1, but must be true or false"),
        ("run.out=true", "run.out is true, but must be text"),
        ("run.out=[a]", "run.out is a list, but must be text"),
        (
            "run.out=!!python/name:os.system x",
            "the tag 'tag:yaml.org,2002:python/name:os.system' does not fit here; remove it",
        ),
        ("data.split=idd", "data.split is 'idd', but must be one of iid, meta, lda, file; did you mean iid?"),
        ("data.split=1", "data.split is 1, but must be one of iid, meta, lda, file"),
        (
            "routing.first_span=1",
            "there is no key routing.first_span; leave it out: the participants of a masked sum agree",
        ),
        ("train.lrr=1", "there is no key train.lrr; did you mean train.lr?"),
        ("trian.lr=1", "there is no key trian; did you mean train?"),
        ("lr=1", "there is no key lr; did you mean train.lr?"),
        ("train.rounds=1", "there is no key train.rounds; did you mean federation.rounds?"),
        (
            "monitor.wxyz=1",
            "there is no key monitor.wxyz; known there: monitor.plot, monitor.progress, monitor.tensorboard",
        ),
        ("train=5", "train is 5, but it is a section; write train.KEY=VALUE"),
        ("deepspeed=zero3.json", "deepspeed is 'zero3.json', but it is a section"),
        ("train.lr", "'train.lr' is not an override; write key=value"),
        ("=1", "'=1' is not an override"),
        ("train..lr=1", "'train..lr=1' is not an override"),
        ("run.name=[x", "the value of 'run.name=[x' is not YAML"),
        ("run.name=#x", "the value of 'run.name=#x' is only a YAML comment"),
        ("run.name=*x", "aliases such as *x are not supported"),
        ("deepspeed={a: 1, a: 2}", "'a' is given twice"),
        ("deepspeed={a: [{b: 1, b: 2}]}", "'b' is given twice"),
        ("deepspeed={[1]: 2}", "a list stands where a key should be"),
    ],
)
def test_bad_overrides(override, said):
    problems = problems_of(None, BASE, override)
    assert said in problems[0]
    assert problems[0].startswith("command line: ")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", None, "is empty; a run's YAML holds sections"),
        ("# only a comment\n", None, "is empty"),
        ("null\n", None, "is empty"),
        ("- a\n- b\n", None, "holds a list; a run's YAML holds sections"),
        ("just words\n", None, "holds 'just words'"),
        ("model:\n  base: m\n bad\n", 3, "is not YAML"),
        ("model: [\n", 2, "is not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "is not YAML"),
        ("model:\n\tbase: m\n", 2, "is not YAML"),
        (
            "model:\n  base: m\n  dtype: fp32\n  base: n\n",
            4,
            "'base' is given twice, first in line 2; remove one",
        ),
        (
            "model: {base: m}\ntrain:\n  lr: 1\ntrain:\n  clip: 1\n",
            4,
            "'train' is given twice, first in line 2",
        ),
        (
            "model: {base: m}\ndeepspeed:\n  fp16:\n    enabled: auto\n    enabled: auto\n",
            5,
            "'enabled' is given twice",
        ),
        ("model: {base: m}\ntrain:\n  ? [a]\n  : 1\n", 3, "a list stands where a key should be"),
        ("model: &m {base: m}\ndata: *m\n", 2, "aliases such as *m are not supported"),
        (
            "model:\n  base: m\ntrain:\n  micro_bach: 1\n",
            4,
            "there is no key train.micro_bach; did you mean train.micro_batch?",
        ),
        ("model:\n  base: m\ntrain:\n  clip:\n", 4, "train.clip is empty, but must be a number, at least 0"),
        ("model:\n  base: m\ntrain:\n- lr\n", 4, "train is a list, but it is a section"),
    ],
)
def test_bad_files(tmp_path, text, line, said):
    path = write(tmp_path, text)
    problems = problems_of(path)
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}:{line}: " if line else f"{path}: ") and said in problems[0]


def test_unreadable_files(tmp_path):
    (tmp_path / "gsm8k.yaml").write_text("model: {base: m}")
    assert problems_of(tmp_path / "gsm8.yaml") == [
        f"{tmp_path}/gsm8.yaml: there is no such file; {tmp_path} holds gsm8k.yaml"
    ]
    assert problems_of(tmp_path / "nowhere" / "x.yaml") == [
        f"{tmp_path}/nowhere/x.yaml: there is no such file; check the path"
    ]
    assert "cannot be read" in problems_of(tmp_path)[0]
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff\xfe")
    assert "is not UTF-8 text (byte 7)" in problems_of(tmp_path / "binary.yaml")[0]
    (tmp_path / "control.yaml").write_bytes(b"model: \x01")
    assert "is not YAML" in problems_of(tmp_path / "control.yaml")[0]


def test_all_problems_come_at_once(tmp_path):
    path = write(
        tmp_path,
        "modle:\n  base: m\ntrain:\n  lr: fast\n  momentum: 0.9\n  micro_batch: 0\n  lr: 1\ndeepspeed:\n  "
        "scheduler: {type: WarmupLR}\n",
    )
    problems = problems_of(path, "data.clients=x", "oops", "federation.clients_per_round=9")
    assert [problem.partition(": ")[0] for problem in problems] == [
        f"{path}:7",
        f"{path}:1",
        f"{path}:4",
        f"{path}:6",
        "command line",
        "command line",
        str(path),
        f"{path}:5",
        f"{path}:9",
    ]
    assert "model.base is empty" in problems[6]
    # data.clients was refused, so nothing is said about clients_per_round=9 of the default's 3
    assert not any("clients_per_round" in problem for problem in problems)


@pytest.mark.parametrize(
    "override",
    [
        f"run.seed={'9' * 20}",
        "run.seed=4294967296",
        f"train.micro_batch={'9' * 23}",
        "train.accumulation=65537",
        "train.local_steps=1000001",
        "data.clients=10001",
        "data.max_tokens=1048577",
        "adapter.lora_rank=65537",
        "federation.rounds=1000001",
        "engine.threads=1025",
        "routing.deadline_s=1e300",
        "cluster.heartbeat_timeout_s=1e300",
        "cluster.start_timeout_s=1e8",
        "cluster.finish_s=1e8",
    ],
)
def test_what_would_exhaust_a_machine_is_refused_with_the_limit(override):
    found = problems_of(None, BASE, override)
    assert (
        len(found) == 1
        and override.partition("=")[0] in found[0]
        and " and at most " in found[0]
        and "e+" not in found[0].partition("at most")[2][:8]
    )


def test_nesting_without_end_is_refused(tmp_path):
    path = write(tmp_path, "[" * 5000)
    assert problems_of(path) == [
        f"{path}: is nested too deeply to be a configuration; give a run's YAML, such as "
        "ds_configs/quickstart.yaml"
    ]
    found = problems_of(None, BASE, f"train.lr={'[' * 5000}", f"deepspeed{'.a' * 5000}=1")
    assert (
        len(found) == 2
        and "nested too deeply" in found[0]
        and len(found[0]) < 300
        and "is not an override" in found[1]
    )


@pytest.mark.parametrize("text", ['"a\\nb"', '"a\\0b"', '"\\ud800"', '"\\t"'])
@pytest.mark.parametrize("key", ["run.name", "data.path"])
def test_a_name_is_text_on_one_line(key, text):
    found = problems_of(None, BASE, "data.task=file", "data.path=x", f"{key}={text}")
    assert len(found) == 1 and ("must be text on one line" in found[0] or "is not YAML" in found[0])


def test_an_unreadable_file_does_not_hide_bad_overrides(tmp_path):
    problems = problems_of(tmp_path / "x.yaml", "train.lr=fast")
    assert (
        len(problems) == 2 and "there is no such file" in problems[0] and "train.lr is 'fast'" in problems[1]
    )


def test_cross_section_problems_name_both_places(tmp_path):
    path = write(
        tmp_path,
        "model:\n  base: m\n  dtype: fp32\nadapter:\n  method: full\ndeepspeed:\n  bf16:\n    enabled: "
        "true\n",
    )
    problems = problems_of(path, "federation.method=flexlora")
    assert problems[0].startswith(
        f"command line and {path}:5: federation.method.name=flexlora works on LoRA factors"
    )
    assert problems[1].startswith(
        f"{path}:8 and {path}:3: deepspeed.bf16.enabled is true, but model.dtype is fp32"
    )
    assert len(problems) == 2


RENAMED = [(key, remedy.removeprefix("write ")) for key, remedy in FORMER_KEYS.items() if "write " in remedy]


@pytest.mark.parametrize(("former", "current"), RENAMED)
def test_a_former_key_is_refused_with_its_current_name_and_its_place(tmp_path, former, current):
    section, _, name = former.partition(".")
    path = write(tmp_path, f"model:\n  base: m\n{section}:\n  {name}: 4\n")
    text = f"there is no key {former}; write {current}"
    assert problems_of(path) == [f"{path}:4: {text}"]
    assert problems_of(None, BASE, f"{former}=4") == [f"command line: {text}"]
    assert current in FIELDS


def test_the_keys_that_were_renamed_last_are_among_them():
    assert {"engine.seats", "engine.slots", "cluster.silence_s"} <= dict(RENAMED).keys()

"""Fields whose values have fields themselves: lists, dictionaries, and unions selected by a name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from fedspeed.config import tree
from fedspeed.config.convert import InvalidValue, convert, expand_shorthand
from fedspeed.config.deepspeed import merge
from fedspeed.config.fields import fields_of
from fedspeed.config.load import load
from fedspeed.config.show import as_dict, fingerprint, render
from fedspeed.errors import ConfigError
from fedspeed.federation.methods.config import METHODS
from fedspeed.models.config import LastBlocks

BASE = "model.base=m"
RANKS = "adapter.rank_by_client"
FLEXLORA = "federation.method=flexlora"
STEPS = "train.local_steps_by_cluster"
ONE_OF = f"one of {', '.join(METHODS)}"


@dataclass(frozen=True)
class Clip:
    name: Literal["clip"] = "clip"
    norm: float = field(default=1.0, metadata={"above": 0.0})


@dataclass(frozen=True)
class Noise:
    scale: float = field(metadata={"min": 0.0})
    name: Literal["noise"] = "noise"


@dataclass(frozen=True)
class Updates:
    both: tuple[Clip | Noise, ...] = ()
    only: tuple[Clip, ...] = ()


FIELDS, _ = fields_of(Updates)


def read(key: str, text: str):
    """Return the value of a field of `Updates` read from a text, or the problems that the loader reports."""
    try:
        return convert(expand_shorthand(tree.compose(text), FIELDS[key].type), FIELDS[key], key)
    except InvalidValue as unfit:
        return [said for _, said in unfit.faults]


def problems_of(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, [BASE, *overrides])
    return caught.value.problems


def value(key: str, *overrides: str):
    section, name = key.split(".")
    return getattr(getattr(load(None, [BASE, *overrides]).config, section), name)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("both", "[]", ()),
        ("both", "[{name: clip, norm: 2}, {name: noise, scale: .5}]", (Clip(norm=2.0), Noise(scale=0.5))),
        ("both", "[clip]", (Clip(),)),
        ("only", "[clip, {name: clip, norm: 3}]", (Clip(), Clip(norm=3.0))),
        (
            "both",
            "{name: clip}",
            [
                "both is a section, but must be a list of entries, each one of clip, noise; "
                "put it into brackets: [{...}]"
            ],
        ),
        ("both", "[clap]", ["both[0].name is 'clap', but must be one of clip, noise; did you mean clip?"]),
        ("only", "[clap]", ["only[0].name is 'clap', but must be clip; did you mean clip?"]),
        ("both", "[{norm: 1}]", ["both[0].name is missing; it must be one of clip, noise"]),
        ("both", "[clip, {name: noise}]", ["both[1].scale is missing; it must be a number, at least 0"]),
        (
            "both",
            "[{name: clip, norm: 0, nrm: 1}, {name: noise, scale: x}]",
            [
                "both[0].norm is 0, but must be a number, above 0",
                "there is no key both[0].nrm where both[0].name is clip; did you mean both[0].norm?",
                "both[1].scale is 'x', but must be a number, at least 0",
            ],
        ),
    ],
)
def test_a_list_of_named_values(key, text, expected):
    assert read(key, text) == expected


@pytest.mark.parametrize(
    ("key", "overrides", "expected"),
    [
        ("engine.cuts", ["engine.cuts=[9, 20]", "engine.pipeline=client"], (9, 20)),
        ("adapter.targets", ["adapter.targets=[q_proj, 007]"], ("q_proj", "007")),
        ("adapter.targets", ["adapter.targets=all-linear"], "all-linear"),
        ("adapter.blocks", ["adapter.blocks.last=3"], LastBlocks(3)),
        ("adapter.blocks", ["adapter.blocks=[0, 5]", "adapter.blocks={last: 4}"], LastBlocks(4)),
        ("adapter.blocks", ["adapter.blocks.last=4", "adapter.blocks=[0, 5]"], (0, 5)),
        ("cluster.local_ranks", ["cluster.local_ranks=2"], 2),
        (STEPS, [f"{STEPS}={{a: 5, b: 4}}", f"{STEPS}.b=3"], {"a": 5, "b": 3}),
        (STEPS, [f"{STEPS}.a=5", f"{STEPS}={{}}"], {}),
        (RANKS, [], {}),
        (RANKS, [FLEXLORA, f"{RANKS}={{0: 8, 2: 4}}", f"{RANKS}.1=2"], {"0": 8, "2": 4, "1": 2}),
        (RANKS, [FLEXLORA, f"{RANKS}.1=2", f"{RANKS}=auto"], "auto"),
        (RANKS, [FLEXLORA, f"{RANKS}=auto", f"{RANKS}.1=2"], {"1": 2}),
    ],
)
def test_lists_and_dictionaries(key, overrides, expected):
    assert value(key, *overrides) == expected


@pytest.mark.parametrize(
    ("overrides", "name", "rule"),
    [
        ([], "lora_average", "avg_factors"),
        (["federation.method=flexlora"], "flexlora", None),
        (["federation.method.rule=freeze_a"], "lora_average", "freeze_a"),
        (["federation.method={name: lora_average, rule: alternate}"], "lora_average", "alternate"),
        (
            ["federation.method.rule=freeze_a", "federation.method.name=lora_average"],
            "lora_average",
            "freeze_a",
        ),
    ],
)
def test_a_method_is_named_and_has_options_of_its_own(overrides, name, rule):
    method = value("federation.method", *overrides)
    assert (method.name, getattr(method, "rule", None)) == (name, rule)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "federation.method=flexlra",
            f"federation.method.name is 'flexlra', but must be {ONE_OF}; did you mean flexlora?",
        ),
        ("federation.method=[1]", f"federation.method is a list, but must be {ONE_OF}"),
        (
            "federation.updates=clip",
            "federation.updates is 'clip', but must be a list of entries, each "
            "clip; put it into brackets: [clip]",
        ),
        ("federation.updates=[{name: clip, norm: 0}]", "updates[0].norm is 0, but must be a number, above 0"),
        ("federation.updates=[clap]", "federation.updates[0].name is 'clap', but must be "),
        ("federation.method={name: [1]}", "federation.method.name is a list, but must be one of"),
        (
            "federation.method.rule=freze_a",
            "federation.method.rule is 'freze_a', but must be one of avg_factors, "
            "freeze_a, alternate; did you mean freeze_a?",
        ),
        (
            "federation.method.rul=freeze_a",
            "there is no key federation.method.rul where federation.method.name "
            "is lora_average; did you mean federation.method.rule?",
        ),
        (
            "federation.method={name: flexlora, rule: freeze_a}",
            "there is no key federation.method.rule where federation.method.name is flexlora",
        ),
        ("federation.method=null", "federation.method is null, but must be one of"),
        (
            "federation.aggregation=avg_factors",
            "there is no key federation.aggregation; write "
            "federation.method.name=lora_average "
            "federation.method.rule=avg_factors",
        ),
        (
            "federation.aggregation=freeze_a",
            "write federation.method.name=lora_average federation.method.rule=freeze_a",
        ),
        (
            "federation.aggregation=alternate",
            "write federation.method.name=lora_average federation.method.rule=alternate",
        ),
        (
            "federation.aggregation=svd",
            "there is no key federation.aggregation; write federation.method.name=flexlora",
        ),
        (
            "federation={aggregation: x}",
            "there is no key federation.aggregation; write federation.method.name=lora_average",
        ),
        (
            "engine.cuts=9,20",
            "engine.cuts is '9,20', but must be auto or a list of whole numbers, each at least "
            "1; write 'engine.cuts=[9, 20]', in YAML cuts: [9, 20]",
        ),
        (
            "engine.cuts=atuo",
            "but must be auto or a list of whole numbers, each at least 1; did you mean auto?",
        ),
        ("engine.cuts=[a]", "engine.cuts[0] is 'a', but must be a whole number, at least 1"),
        ("adapter.targets=q_proj,v_proj", "write 'adapter.targets=[q_proj, v_proj]'"),
        ("adapter.targets=[q_proj, true]", "adapter.targets[1] is true, but must be text on one line"),
        (
            "adapter.targets=[]",
            "adapter.targets is []; write attention, all-linear, or a list of names such as [q_proj, v_proj]",
        ),
        ("adapter.blocks=last:2", "write 'adapter.blocks={last: 2}', in YAML blocks: {last: 2}"),
        ("adapter.blocks=10,12-14", "write 'adapter.blocks=[10, 12, 13, 14]'"),
        (
            "adapter.blocks=x",
            "adapter.blocks is 'x', but must be {last: a whole number, at least 1 and at most "
            "1024} or a list of whole numbers",
        ),
        ("adapter.blocks={lst: 2}", "there is no key adapter.blocks.lst; did you mean adapter.blocks.last?"),
        ("adapter.blocks=[-1]", "adapter.blocks[0] is -1, but must be a whole number, at least 0"),
        ("cluster.local_ranks=0", "cluster.local_ranks is 0, but must be auto or a whole number, at least 1"),
        (
            "cluster.ranks_per_client=two",
            "cluster.ranks_per_client is 'two', but must be auto or a whole number, at least 1",
        ),
        (
            "cluster.ranks_per_client=\u0664",
            "cluster.ranks_per_client is '\u0664', but must be auto or a whole number",
        ),
        (f"cluster.local_ranks={'9' * 5000}", "but must be auto or a whole number, at least 1"),
        (
            "train.local_steps_by_cluster=fast:20,slow=10",
            "write 'train.local_steps_by_cluster={fast: 20, slow: 10}'",
        ),
        (
            "train.local_steps_by_cluster=[3]",
            "train.local_steps_by_cluster is a list, but must be a dictionary "
            "of whole numbers, each at least 1",
        ),
        (
            "train.local_steps_by_cluster.fast=0",
            "train.local_steps_by_cluster.fast is 0, but must be a whole "
            "number, at least 1 and at most 1000000",
        ),
        (
            "train.local_steps_by_cluster.fast.x=1",
            "train.local_steps_by_cluster.fast is a section, but must be a whole number",
        ),
        ("train.local_steps_by_cluster={a: 1, a: 2}", "'a' is given twice"),
        ("adapter.targets=[!!int x]", "the tag 'tag:yaml.org,2002:int' does not fit here"),
    ],
)
def test_what_is_wrong_inside_a_value(override, said):
    problems = problems_of(None, override)
    assert len(problems) == 1 and problems[0].startswith("command line: ") and said in problems[0]


def test_every_fault_of_a_nested_value_has_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "federation:\n  method:\n    rule: freeze\n    rles: 1\ntrain:\n  "
        "local_steps_by_cluster:\n    a: 0\n    b: 1\n    c: x\n"
    )
    places = [problem.partition(": ")[0] for problem in problems_of(path)]
    assert places == [f"{path}:3", f"{path}:4", f"{path}:7", f"{path}:9"]


def test_the_command_line_lies_on_top_of_the_file_value_by_value(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {base: m}\nfederation:\n  method:\n    name: lora_average\n    rule: "
        "freeze_a\ntrain:\n  local_steps_by_cluster: {a: 4, b: 2}\n"
    )
    loaded = load(path, ["federation.method.rule=alternate", "train.local_steps_by_cluster.b=3"])
    assert loaded.config.federation.method.rule == "alternate"
    assert loaded.config.train.local_steps_by_cluster == {"a": 4, "b": 3}
    assert {
        key: source for key, source in loaded.sources.items() if key.startswith(("federation.method", STEPS))
    } == {
        "federation.method": f"{path}:4 and command line",
        "federation.method.name": f"{path}:4",
        "federation.method.rule": "command line",
        "train.local_steps_by_cluster": f"{path}:7 and command line",
        "train.local_steps_by_cluster.a": f"{path}:7",
        "train.local_steps_by_cluster.b": "command line",
    }
    # What the file says of its own method does not stay with another one; what the command says must fit.
    assert load(path, ["federation.method.name=flexlora"]).config.federation.method.name == "flexlora"
    found = problems_of(path, "federation.method.rule=alternate", "federation.method=flexlora")
    assert len(found) == 1 and "there is no key federation.method.rule" in found[0]


def test_nested_values_are_printed_and_load_back(tmp_path):
    given = [
        "federation.method.rule=alternate",
        "train.local_steps_by_cluster={slow: 3, '007': 2, yes: 1}",
        "adapter.targets=[q_proj, 'no']",
        "adapter.blocks=[3, 1]",
        "engine.cuts=[9, 20]",
        "engine.pipeline=client",
        "federation.updates=[clip, {name: clip, norm: 2}]",
    ]
    loaded = load(None, [BASE, *given])
    for explained in (False, True):
        text = render(loaded, merge({}, loaded.config, tmp_path), explained=explained)
        path = tmp_path / "copy.yaml"
        path.write_text(text)
        again = load(path).config
        assert again == loaded.config and fingerprint(again) == fingerprint(loaded.config)
    lines = [line.split("  # ") for line in text.splitlines()]
    assert ["command line"] == [line[1] for line in lines if line[0].strip() == "rule: alternate"]
    assert ["default"] == [line[1] for line in lines if line[0].strip() == "name: lora_average"]
    assert (
        "  updates: [{name: clip, norm: 1.0}, {name: clip, norm: 2.0}]  # command line" in text.splitlines()
    )
    assert "alternate: B and A in turn by round" in " ".join(text.replace("#", "").split())


def test_plain_types_are_json_and_a_copy():
    config = load(None, [BASE, "adapter.targets=[q_proj]", "train.local_steps_by_cluster.a=2"]).config
    values = as_dict(config)
    values["train"]["local_steps_by_cluster"]["a"] = 9
    assert values["adapter"]["targets"] == ["q_proj"] and values["adapter"]["blocks"] == {"last": 2}
    assert values["federation"]["method"] == {"name": "lora_average", "rule": "avg_factors"}
    assert config.train.local_steps_by_cluster == {"a": 2}

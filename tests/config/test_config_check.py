"""Rules between the sections of the configuration."""

import dataclasses

import pytest

from fedspeed.config.check import conflicts, notes, problems
from fedspeed.config.run import METHOD_VARIANTS, UPDATE_VARIANTS, RunConfig, _variants
from fedspeed.federation.methods.config import METHODS, Entry

AVERAGE = METHOD_VARIANTS["lora_average"]
FLEXLORA = METHOD_VARIANTS["flexlora"]()


def config(**sections) -> RunConfig:
    """Return a RunConfig with a base and these values, given as section={field: value}."""
    run = RunConfig()
    sections = {"model": {"base": "m"}, **sections}
    return dataclasses.replace(
        run,
        **{
            name: values if name == "deepspeed" else dataclasses.replace(getattr(run, name), **values)
            for name, values in sections.items()
        },
    )


def test_defaults_lack_only_a_model():
    assert problems(config()) == []
    assert [p.partition(" ")[0] for p in problems(RunConfig())] == ["model.base"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"adapter": {"method": "full"}, "federation": {"method": FLEXLORA}},
            "federation.method.name=flexlora works on LoRA factors, but adapter.method is full",
        ),
        (
            {"adapter": {"method": "full"}, "federation": {"method": AVERAGE(rule="freeze_a")}},
            "federation.method.rule=freeze_a works on LoRA factors",
        ),
        (
            {"adapter": {"method": "full"}, "federation": {"method": AVERAGE(rule="alternate")}},
            "federation.method.rule=alternate works on LoRA factors",
        ),
        (
            {"federation": {"method": AVERAGE(rule="alternate"), "local_optimizer": "keep"}},
            "federation.local_optimizer=keep decays the moments",
        ),
        (
            {"federation": {"method": FLEXLORA, "local_optimizer": "keep"}},
            "federation.method.name=flexlora does not declare that its new state is the old one plus a delta "
            "of each array",
        ),
        (
            {"federation": {"method": FLEXLORA, "server_optimizer": "momentum"}},
            "federation.server_optimizer=momentum might combine arrays",
        ),
        (
            {"federation": {"method": FLEXLORA, "server_lr": 0.5}},
            "federation.server_lr=0.5 might combine arrays that do not correspond; set it to 1.0",
        ),
        (
            {"federation": {"method": FLEXLORA, "staleness": 1}},
            "federation.method.name=flexlora does not declare that late updates may be added",
        ),
        (
            {"federation": {"method": FLEXLORA, "round_budget": "seconds", "round_seconds": 1.0}},
            "have trained for different numbers of steps",
        ),
        (
            {"federation": {"method": FLEXLORA}, "routing": {"mode": "mask"}},
            "federation.method.name=flexlora needs every client's own values, which routing.mode",
        ),
        (
            {"federation": {"method": METHOD_VARIANTS["stack"](), "updates": (UPDATE_VARIANTS["clip"](),)}},
            "federation.updates (clip) transform deltas that are averaged, but federation.method.name=stack "
            "does not declare that it averages any",
        ),
        (
            {"federation": {"public_rows": "rows.jsonl"}},
            "federation.public_rows=rows.jsonl would not be read, because "
            "federation.method.name=lora_average",
        ),
        (
            {"federation": {"method": METHOD_VARIANTS["residual"]()}, "engine": {"compile_blocks": True}},
            "federation.method.name=residual adds different weights to each block; set "
            "engine.compile_blocks=false",
        ),
        (
            {"adapter": {"method": "full", "start_from": "runs/x"}},
            "adapter.start_from=runs/x is a PEFT adapter, but adapter.method is full",
        ),
        ({"adapter": {"targets": ()}}, "adapter.targets is []"),
        ({"adapter": {"targets": ("q_proj", "")}}, 'adapter.targets is [q_proj, ""]'),
        (
            {"adapter": {"method": "blocks", "blocks": ()}},
            "adapter.blocks is [], so that nothing would train",
        ),
        ({"train": {"momentum": 0.9}}, "train.momentum=0.9 is for sgd, but train.optimizer is adamw"),
        ({"federation": {"clients_per_round": 4}}, "federation.clients_per_round=4 of data.clients=3"),
        ({"data": {"task": "file"}}, "data.task=file needs data.path"),
        ({"run": {"name": "../x"}}, "run.name is '../x'"),
        (
            {"engine": {"matmul": "fp16_accumulation"}, "model": {"base": "m", "dtype": "bf16"}},
            "engine.matmul=fp16_accumulation changes products of fp16 numbers, but the run computes in "
            "model.dtype=bf16",
        ),
        (
            {"engine": {"matmul": "tf32"}, "model": {"base": "m", "dtype": "fp16"}},
            "engine.matmul=tf32 changes products of fp32 numbers",
        ),
        ({"run": {"name": ".."}}, "run.name is '..'"),
        ({"run": {"name": "x" * 201}}, "run.name has 201 bytes; choose one of at most 200"),
        ({"run": {"name": "\u00fc" * 150}}, "run.name has 300 bytes"),
        ({"run": {"out": ""}}, "run.out is empty"),
        (
            {"data": {"path": "rows.jsonl"}},
            "data.path=rows.jsonl would not be read, because data.task=builtin makes its rows",
        ),
        (
            {
                "data": {
                    "task": "file",
                    "path": "rows.jsonl",
                    "template": "alpaca",
                    "system_prompt": "Be brief",
                }
            },
            "data.system_prompt would have no effect, because data.template=alpaca is no chat template; set",
        ),
        (
            {"data": {"chat_template": "x.jinja"}},
            "data.chat_template would have no effect, because data.template=auto is no chat template for the",
        ),
        (
            {"deepspeed": {"fp16": {"enabled": True}}},
            "deepspeed.fp16.enabled is true, but model.dtype is auto",
        ),
        (
            {"routing": {"transport": "tls"}},
            "model.dtype=auto is decided among the ranks of one job, but routing.transport=tls has a job on "
            "each site",
        ),
        (
            {"deepspeed": {"bf16": {"enabled": False}}},
            "deepspeed.bf16.enabled is false, but model.dtype is auto",
        ),
    ],
)
def test_each_rule(sections, said):
    found = problems(config(**sections))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"method": "lora"}, "federation": {"method": FLEXLORA}},
        {"adapter": {"method": "full"}, "federation": {"method": AVERAGE(rule="avg_factors")}},
        {"adapter": {"method": "blocks", "blocks": (0, 2)}, "federation": {"method": AVERAGE()}},
        {"adapter": {"start_from": "runs/x"}},
        {"train": {"momentum": 0.9, "optimizer": "sgd"}},
        {"train": {"local_steps_by_cluster": {"fast": 3, "slow": 1}}},
        {"federation": {"clients_per_round": 3}},
        {"engine": {"matmul": "fp16_accumulation"}},
        {"engine": {"matmul": "tf32"}, "model": {"base": "m", "dtype": "fp32"}},
        {"data": {"task": "file", "path": "rows.jsonl"}},
        {"cluster": {"ranks_per_client": 2, "local_ranks": 1}},
        {
            "deepspeed": {"base": "zero3.json", "bf16": {"enabled": True}, "fp16": {"enabled": "auto"}},
            "model": {"base": "m", "dtype": "bf16"},
        },
        {
            "deepspeed": {
                "base": "zero3.json",
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": "auto", "initial_scale_power": 12},
            }
        },
    ],
)
def test_what_goes_together(sections):
    assert problems(config(**sections)) == []


def test_a_method_brings_rules_of_its_own(monkeypatch):
    """The general rules name no method."""

    @dataclasses.dataclass(frozen=True)
    class Own:
        name: str = "own"
        depth: int = 9

        def problems(self, config):
            return [
                (("federation.method", "train.lr"), f"depth={self.depth} with train.lr={config.train.lr:g}")
            ]

    monkeypatch.setitem(METHODS, "own", Entry(module="nowhere", any_weights=True))
    for chosen in (
        {"method": Own()},
        {"updates": (UPDATE_VARIANTS["clip"](), Own())},
    ):  # and so does a transform
        (found,) = conflicts(config(train={"lr": 0.5}, federation=chosen))
        assert (found.keys, found.text) == (("federation.method", "train.lr"), "depth=9 with train.lr=0.5")


def test_an_arm_has_the_name_that_it_is_registered_by():
    with pytest.raises(ValueError, match="`name` is 'clip', but it is registered as 'clop'"):
        _variants(["clop"], lambda name: UPDATE_VARIANTS["clip"])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"federation": {"method": METHOD_VARIANTS["residual"]()}},
            "federation.method.name=residual needs LoRA factors of one shape on all clients; set "
            "federation.method=flexlora or stack",
        ),
        (
            {"federation": {"method": AVERAGE()}},
            "federation.method.name=lora_average needs LoRA factors of one shape",
        ),
        ({"adapter": {"method": "full"}}, "but adapter.method=full trains no LoRA"),
        ({"adapter": {"start_from": "a"}}, "the adapter in adapter.start_from=a has one rank"),
        ({"adapter": {"lora_rank": 2}}, "adapter.rank_by_client.1=4 is above adapter.lora_rank=2"),
        ({"engine": {"pipeline": "cluster"}}, "set engine.pipeline=client or none"),
        ({"engine": {"compile_blocks": True}}, "engine.compile_blocks=true computes all blocks by the code"),
        ({"routing": {"mode": "mask"}}, "needs every client's own values"),
        ({"routing": {"transport": "tls"}}, "needs every client's own values"),
        ({"data": {"clients": 1}}, "names client 1, but data.clients=1 has clients 0 to 0"),
        (
            {"adapter": {"rank_by_client": {"-1": 4}}},
            "names client -1, but data.clients=2 has clients 0 to 1",
        ),
        ({"adapter": {"rank_by_client": {"01": 4}}}, "names client 01"),
        ({"adapter": {"rank_by_client": {"one": 4}}}, "names client one"),
        (
            {"adapter": {"rank_by_client": "auto"}, "federation": {"method": AVERAGE()}},
            "rank_by_client=auto: ",
        ),
    ],
)
def test_what_unequal_ranks_do_not_go_with(sections, said):
    allowed = {
        "data": {"clients": 2},
        "adapter": {"lora_rank": 8, "rank_by_client": {"1": 4}},
        "federation": {"method": FLEXLORA},
    }
    assert problems(config(**allowed)) == []
    mixed = {name: {**allowed.get(name, {}), **values} for name, values in sections.items()}
    found = "; ".join(problems(config(**{**allowed, **mixed})))
    assert said in found


@pytest.mark.parametrize(("warmup", "notes_it"), [(0, False), (20, False), (21, True)])
def test_a_warm_up_that_never_ends_is_noted(warmup, notes_it):
    found = notes(
        config(
            train={"warmup_steps": warmup, "local_steps": 1, "local_steps_by_cluster": {"a": 10}},
            federation={"rounds": 2},
        )
    )
    assert found == (
        []
        if not notes_it
        else [
            "train.warmup_steps=21, but the run has only 2 x 10 local steps, so that train.lr=0.001 is "
            "never reached; "
            "lower train.warmup_steps"
        ]
    )


def test_what_a_server_does_not_go_with(monkeypatch):
    monkeypatch.setitem(
        METHODS, "lora_average", dataclasses.replace(METHODS["lora_average"], server=True, public_rows=True)
    )
    federation = {"staleness": 1, "compare_alone": True}
    found = "; ".join(
        problems(config(federation=federation, engine={"pipeline": "client"}, routing={"transport": "tls"}))
    )
    for text in (
        "engine.pipeline=client divides the model over",
        "federation.staleness=1 trains during",
        "federation.compare_alone=true trains",
        "routing.transport=tls has a job on each site, but a server needs one job",
        "federation.public_rows is empty",
    ):
        assert text in found
    assert problems(config(federation={"public_rows": "rows.jsonl"})) == []


@pytest.mark.parametrize("mode", ["mask", "mix", "mix+mask"])
def test_a_pairwise_masked_sum_is_no_masked_mode(mode):
    """It is mode plain in all that is shown and written, and refused in the modes that hide more."""
    routing = {"mode": mode}
    for secure_sum in ("native", "compact"):
        method = METHOD_VARIANTS["fate_llm"](secure_sum=secure_sum)
        (found,) = conflicts(config(federation={"method": method}, routing=routing))
        assert found.keys == ("federation.method.secure_sum", "routing.mode")
        assert f"protects less than routing.mode={mode}; set routing.mode=plain" in found.text
        assert problems(config(federation={"method": method}, routing={"mode": "plain"})) == []
        assert not config(federation={"method": method}, routing={"mode": "plain"}).routing.sums_only
    unmasked = METHOD_VARIANTS["fate_llm"](secure_sum="none")
    assert problems(config(federation={"method": unmasked}, routing=routing)) == []

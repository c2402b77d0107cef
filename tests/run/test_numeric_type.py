"""model.dtype=auto: chosen once from the devices, printed, and kept when the run resumes."""

import json
from types import SimpleNamespace

import pytest
import yaml

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.cli import main
from fedspeed.config.load import load
from fedspeed.config.show import as_dict
from fedspeed.errors import FedSpeedError, ModelError, PlanError
from fedspeed.models.numeric_types import DeviceTypes
from fedspeed.session import numeric_type
from fedspeed.session.request import RunRequest
from tests.run.launched import LLAMA, SETTINGS
from tests.run.meeting import meet


@pytest.fixture
def order(tmp_path, monkeypatch):
    """Return a run request in the working folder, with overrides and perhaps a hostfile."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    settings = {
        **SETTINGS,
        "model": {"base": "model", **SETTINGS["model"]},
        "monitor": {"progress": False},
        "run": {"name": "mine"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    def make(*arguments: str, hosts: str = "", fresh: bool = False) -> RunRequest:
        (tmp_path / "hosts").write_text(hosts)
        return RunRequest(
            load(tmp_path / "run.yaml", arguments), tmp_path / "hosts" if hosts else None, fresh=fresh
        )

    return make


def begin(order: RunRequest, dtype: str) -> None:
    """Write the files that a first round in this type leaves."""
    config = as_dict(order.with_dtype(dtype).config)
    Journal(order.folder, 2).commit(Entry(1, order.with_dtype(dtype).fingerprint, 0, config), {})


def gpus(monkeypatch, *types: tuple[str, ...]) -> None:
    """Make the rule see GPUs of these types on the machine."""
    found = [
        DeviceTypes(f"cuda:{i} of here", "gpu", frozenset({"fp32", *has})) for i, has in enumerate(types)
    ]
    monkeypatch.setattr(
        "fedspeed.engine.device_types.device_types",
        lambda local_rank=None: found if local_rank is None else [found[local_rank % len(found)]],
    )
    monkeypatch.setattr("fedspeed.engine.device_types.check_dtype", lambda dtype, began="": None)


def enabled(order: RunRequest) -> list[str]:
    """Return the 16-bit types that the DeepSpeed configuration enables."""
    return [name for name in ("bf16", "fp16") if order.deepspeed.get(name, {}).get("enabled")]


HOSTS = """a slots=1
b slots=1
c slots=1
# fed-host a gpu=rtx3090
# fed-host b gpu={}
# fed-host c gpu=rtx3090
"""


def test_on_cpus_it_is_fp32_and_the_dry_run_says_so(order):
    settled, said = numeric_type.predict(order())
    assert settled.config.model.dtype == "fp32" and "model.dtype=fp32 (auto: the cpu of" in said
    assert settled.loaded.sources["model.dtype"] == "auto (default)" and enabled(settled) == []
    assert numeric_type.predict(order("model.dtype=fp32"))[1] == "", "what is named needs no word"


@pytest.mark.parametrize(
    ("types", "dtype"),
    [([("bf16", "fp16")], "bf16"), ([("bf16", "fp16"), ("fp16",)], "fp16"), ([()], "fp32")],
)
def test_on_gpus_it_is_what_all_of_them_have(order, monkeypatch, types, dtype):
    gpus(monkeypatch, *types)
    settled, said = numeric_type.predict(order())
    assert settled.config.model.dtype == dtype and f"model.dtype={dtype}" in said
    assert enabled(settled) == [dtype] * (dtype != "fp32")


def test_the_hostfile_tells_of_cards_that_are_elsewhere(order):
    assert numeric_type.predict(order(hosts=HOSTS.format("rtx3090")))[0].config.model.dtype == "bf16"
    settled, said = numeric_type.predict(order(hosts=HOSTS.format("rtx2080ti")))
    assert settled.config.model.dtype == "fp16" and "rtx2080ti of b" in said
    unsettled, said = numeric_type.predict(order(hosts=HOSTS.format("rtx7777")))
    assert (
        unsettled.config.model.dtype == "auto" and "decided when the ranks meet" in said and "rtx7777" in said
    )
    with pytest.raises(
        PlanError, match=r"model.dtype=bf16: 1 of the cards \(rtx2080ti\) cannot compute in it"
    ):
        numeric_type.predict(order("model.dtype=bf16", hosts=HOSTS.format("rtx2080ti")))


def test_the_dry_run_ends_well_where_the_type_is_decided_later(order, capsys):
    order(hosts=HOSTS.format("rtx7777"))
    arguments = ["run", "--config", "run.yaml", "--hostfile", "hosts", "--dry-run"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "model.dtype=auto: decided when the ranks meet" in said and "should it" not in said
    assert main([*arguments, "engine.tier=ram", "engine.base_gib=0.0002"]) == 0
    assert "note     if it is resolved to fp32: engine.base_gib=0.0002" in capsys.readouterr().out


def test_a_type_that_this_machine_lacks_is_refused_in_the_dry_run(order, monkeypatch, capsys):
    from deepspeed.accelerator import get_accelerator

    order()
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    assert main(["run", "--config", "run.yaml", "--dry-run", "model.dtype=fp16"]) == 2
    said = capsys.readouterr().err
    assert (
        "model.dtype=fp16" in said
        and "cannot compute in it; choose fp32 or bf16, or model.dtype=auto" in said
    )


def test_print_config_shows_what_was_asked(order, capsys):
    order()
    assert main(["run", "--config", "run.yaml", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["dtype"] == "auto"


def test_what_auto_comes_to_is_held_to_the_rules_too(order, capsys):
    """The configuration as written breaks no rule."""
    order(hosts=HOSTS.format("rtx3090"))
    arguments = ["run", "--config", "run.yaml", "--hostfile", "hosts", "--dry-run"]
    assert main([*arguments, "engine.matmul=fp16_accumulation"]) == 2
    assert (
        "changes products of fp16 numbers, but the run computes in model.dtype=bf16"
        in capsys.readouterr().err
    )


# A run keeps the type it began with.


def test_a_run_goes_on_in_the_type_it_began_in(order):
    begin(order(), "bf16")
    settled, said = numeric_type.predict(order())
    assert settled.config.model.dtype == "bf16" and "mine began in it" in said
    assert (
        numeric_type.with_original_dtype(order()).fingerprint
        == settled.fingerprint
        == order("model.dtype=bf16").fingerprint
        != order("model.dtype=fp32").fingerprint
    )
    assert numeric_type.predict(order(fresh=True))[0].config.model.dtype == "fp32"
    assert numeric_type.with_original_dtype(order("model.dtype=fp32")).config.model.dtype == "fp32"


def test_a_run_does_not_go_on_where_its_type_is_missing(order, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    begin(order(), "fp16")
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    with pytest.raises(
        ModelError,
        match="model.dtype=fp16, in which the run in .*mine began: .*; resume it on devices that can, or",
    ):
        numeric_type.predict(order())


# The ranks decide together.


def test_all_ranks_take_what_the_oldest_card_has(order, monkeypatch):
    gpus(monkeypatch, ("bf16", "fp16"), ("fp16",), ("bf16", "fp16"))
    found = meet(order(), 3, numeric_type.agree)
    assert {one.job.config.model.dtype for one in found} == {"fp16"} and len({
        one.job.request.fingerprint for one in found
    }) == 1
    assert "cuda:1 of here cannot do bf16" in found[0].text and not found[0].resumed


def test_a_rank_without_clients_has_no_say(order, monkeypatch):
    gpus(monkeypatch, ("bf16",), ("bf16",), ("bf16",), ())
    found = meet(order(), 4, lambda job, store: numeric_type.agree(job, store) if job.place.clients else None)
    assert [one and one.job.config.model.dtype for one in found] == ["bf16", "bf16", "bf16", None]


def test_the_reporters_journal_decides_for_all(order, monkeypatch):
    begin(order(), "fp32")
    gpus(monkeypatch, ("bf16",))
    found = meet(order(), 3, numeric_type.agree)
    assert {(one.job.config.model.dtype, one.resumed) for one in found} == {("fp32", True)}


def test_a_device_that_cannot_be_asked_ends_all_at_once(order, monkeypatch):
    def broken(local_rank=None):
        if local_rank == 1:
            raise FedSpeedError("no driver")
        return [DeviceTypes("a", "gpu", frozenset({"fp32"}))]

    monkeypatch.setattr("fedspeed.engine.device_types.device_types", broken)
    assert all("no driver" in str(one) for one in meet(order(), 3, numeric_type.agree))


@pytest.mark.parametrize(
    ("capability", "types"),
    [((9, 0), {"bf16", "fp16"}), ((8, 0), {"bf16", "fp16"}), ((7, 5), {"fp16"}), ((6, 1), set())],
)
def test_emulated_types_of_old_cards_do_not_count(monkeypatch, capability, types):
    """Torch reports bf16 for every card because it counts emulation."""
    import deepspeed.accelerator as deepspeed_accelerator

    from fedspeed.engine import device_types

    card = SimpleNamespace(
        device_name=lambda: "cuda",
        device_count=lambda: 2,
        is_bf16_supported=lambda: True,
        is_fp16_supported=lambda: True,
    )
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(deepspeed_accelerator, "get_accelerator", lambda: card)
    monkeypatch.setattr(device_types, "_capability", lambda index: capability)
    [mine] = device_types.device_types(local_rank=3)
    assert mine.types == {"fp32"} | types and mine.kind == "gpu" and mine.name.startswith("cuda:1 of ")
    assert len(device_types.device_types()) == 2
    device_types.check_dtype("fp16")  # slow on the oldest, but asked for
    if "bf16" in types:
        device_types.check_dtype("bf16")
    else:
        with pytest.raises(ModelError, match="model.dtype=bf16: the cuda of .* choose fp32 or fp16, or"):
            device_types.check_dtype("bf16")

"""adapter.rank_by_client: resolved from the hostfile, printed by the dry run, the same for every start."""

import json
from types import SimpleNamespace

import pytest
import yaml

from fedspeed.cli import main
from fedspeed.cluster.hostfile import parse
from fedspeed.config.load import load
from fedspeed.errors import PlanError
from fedspeed.session.client_ranks import engine_rank, with_client_ranks
from fedspeed.session.request import RunRequest
from tests.run.launched import LLAMA, SETTINGS

BIG = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "vocab_size": 32000,
}
HOSTS = """a slots=2
b slots=2
c slots=2
# fed-host a gpu=rtx3090
# fed-host b gpu={}
# fed-host c gpu={}
"""


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    """Return a function that makes the request of a run of three clients with overrides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA | BIG))
    (tmp_path / "hosts").write_text(HOSTS.format("rtx3090", "rtx2080ti"))
    settings = {
        "model": {"base": "model", **SETTINGS["model"], "dtype": "fp16"},
        "adapter": {"lora_rank": 256, "targets": "all-linear", "rank_by_client": "auto"},
        "data": SETTINGS["data"] | {"max_tokens": 512},
        "federation": {"method": "flexlora", "rounds": 2},
        "engine": {"tier": "resident"},
        "routing": {"mode": "plain"},
        "monitor": {"progress": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return lambda *arguments: RunRequest(load(tmp_path / "run.yaml", arguments))


def hosts(*cards):
    return parse(HOSTS.format(*cards), "test").hosts


def test_auto_gives_small_cards_a_smaller_rank(request_of):
    request, text = with_client_ranks(request_of(), hosts("rtx3090", "rtx2080ti"))
    ranks = request.config.adapter.rank_by_client
    assert ranks["0"] == ranks["1"] == 256 > ranks["2"] >= 1
    assert text == (
        f"clients 0 to 1: 256 (auto: fits 22.3 GiB of rtx3090), client 2: {ranks['2']} "
        "(auto: fits 10.2 GiB of rtx2080ti)"
    )
    assert request.loaded.sources["adapter.rank_by_client"].startswith("auto (")
    again, _ = with_client_ranks(request_of(), hosts("rtx3090", "rtx2080ti"))
    assert again.fingerprint == request.fingerprint, "every start comes to the same"
    other, _ = with_client_ranks(request_of(), hosts("rtx2080ti", "rtx2080ti"))
    assert other.fingerprint != request.fingerprint, "with other hosts the run is not resumed"


def test_auto_of_hosts_that_are_not_known_is_the_configured_rank(request_of):
    request, text = with_client_ranks(request_of(), hosts("rtx7777", "rtx2080ti"))
    assert request.config.adapter.rank_by_client["1"] == 256
    assert "client 1: 256 (auto: its devices are not known, so adapter.lora_rank)" in text
    request, text = with_client_ranks(request_of(), parse("a slots=3\n", "test").hosts)
    assert set(request.config.adapter.rank_by_client.values()) == {256} and text.startswith("clients 0 to 2")


def test_ranks_that_are_named_are_kept(request_of):
    request, text = with_client_ranks(
        request_of("adapter.rank_by_client={1: 4}"), hosts("rtx3090", "rtx3090")
    )
    assert text == "client 0: 256, client 1: 4, client 2: 256"
    assert request.config.adapter.rank_by_client == {"1": 4}
    assert with_client_ranks(request_of("adapter.rank_by_client={}"), ())[1] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("engine.pipeline=client",), "does not know what a rank of this engine needs"),
        (("deepspeed.base=zero3.json", "engine.tier=stock"), "ZeRO-3 with engine.tier=stock"),
        (
            ("train.micro_batch=64", "data.max_tokens=4096", "engine.block_inputs=device"),
            "client 0 does not have the memory even for LoRA rank 1 with engine.tier=resident: ",
        ),
    ],
)
def test_auto_that_cannot_be_decided_is_refused(request_of, arguments, message):
    with pytest.raises(PlanError, match=message):
        with_client_ranks(request_of(*arguments), hosts("rtx3090", "rtx2080ti"))


def test_the_dry_run_names_the_rank_of_each_client(request_of, capsys):
    request_of()
    arguments = ["run", "--config", "run.yaml", "--hostfile", "hosts", "--dry-run"]
    assert main(arguments) == 0
    assert (
        "\nranks    clients 0 to 1: 256 (auto: fits 22.3 GiB of rtx3090), client 2: "
        in capsys.readouterr().out
    )
    assert main([*arguments, "adapter.rank_by_client={}"]) == 0
    assert "\nranks " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [8, 2]),  # ranks 0 and 1 are one cluster, with clients (0, 1) and (2,)
        (("deepspeed.base=zero3.json",), [8, 2]),
        (("deepspeed.base=zero3.json", "engine.tier=stock"), [8, 8]),
        (("deepspeed.base=zero3.json", "engine.tier=auto", "adapter.targets=[embed_tokens]"), [8, 8]),
    ],
)
def test_an_engine_has_the_largest_rank_of_its_clients(request_of, arguments, expected):
    """Or of all in its torch world, where all ranks must gather the same sizes in the same order."""
    from fedspeed.cluster.topology import topology_of
    from fedspeed.session.engine_spec import engine_spec

    ranks = "adapter.rank_by_client={0: 4, 2: 2}"
    request = request_of("engine.tier=auto", "adapter.lora_rank=8", ranks, *arguments)
    topology = topology_of(request.config, parse("a slots=2\n", "test").hosts)
    kind = engine_spec(request.config, request.deepspeed, "client").kind
    found = []
    for rank in (0, 1):
        job = SimpleNamespace(
            config=request.config,
            request=request,
            topology=topology,
            place=topology.placement(rank),
            world=topology.world_of(rank, "none"),
        )
        found.append(engine_rank(job, kind))
    assert found == expected

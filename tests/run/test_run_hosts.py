"""Hosts of a job, or sites of a federation, that read different inputs: training does not start."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import place_clients
from fedspeed.config.load import load
from fedspeed.errors import FedSpeedError
from fedspeed.session import rank_inputs, shared_gpus, site
from fedspeed.session.request import Job, RunRequest
from fedspeed.session.resume import RunLock
from tests.limits import LIMIT_S
from tests.run.launched import LLAMA
from tests.run.meeting import Meeting
from tests.tiny import write_llama

HOSTS = (Host("alpha", 1), Host("beta", 2))


def disk(folder: Path) -> Path:
    """Write the files that every host has on a disk of its own."""
    write_llama(folder / "base")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": f"say {n}", "output": f"{n}"}) + "\n" for n in range(40))
    )
    (folder / "run.yaml").write_text(
        "model: {base: base, dtype: fp32, tokenizer: bytes}\n"
        "data: {task: file, path: rows.jsonl, clients: 3, split: iid, max_tokens: 64, template: plain}\n"
    )
    return folder


def another_row(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"instruction": "one more", "output": "row"}\n')


def other_weights(folder: Path) -> None:
    write_llama(folder / "base", seed=1)


def other_config(folder: Path) -> None:
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def read(orders: dict[str, RunRequest]) -> list:
    """Return what the ranks of all hosts read, each from the disk of its host, or the error of the rank."""
    store = Meeting()
    found = [None] * 3

    def life(number: int) -> None:
        launch = Launch(
            "local",
            number,
            3,
            local_rank=number,
            hostfile=None,
            hosts=HOSTS,
            master_addr="127.0.0.1",
            master_port=0,
        )
        order = orders["beta" if number else "alpha"]
        try:
            job = Job(order, launch, place_clients(HOSTS, 3, "auto"))
            shared_gpus.publish_gpu(job, store)
            found[number] = rank_inputs.read_inputs(job, store, RunLock(), False)
        except FedSpeedError as error:
            found[number] = error

    threads = [threading.Thread(target=life, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_row, "the rows of data.path="),
        (other_weights, "the weights of model.base="),
        (other_config, "the config.json of model.base="),
    ],
)
def test_a_host_that_has_read_something_else_is_named_to_all(tmp_path, change: Callable, named: str):
    places = {host.name: disk(tmp_path / host.name) for host in HOSTS}
    orders = {name: RunRequest(load(place / "run.yaml")) for name, place in places.items()}
    assert [one for one in read(orders) if not isinstance(one, rank_inputs.Inputs)] == [], (
        "copies on other disks are the same"
    )
    change(places["beta"])
    for error in read(orders):
        assert isinstance(error, FedSpeedError) and error.exit_code == 2
        assert f"host beta has read another content than host alpha: {named}" in str(
            error
        ) and "to all hosts" in str(error)


FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)


@pytest.mark.parametrize("file", FILES)
def test_sites_compare_all_files_of_a_tokenizer(tmp_path, file):
    base = tmp_path / "base"
    (base / "additional_chat_templates").mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(LLAMA))
    config = load(None, [f"model.base={base}", "model.init=random"]).config
    found = [site.content(config)]
    for text in ("{}", "{ }"):
        (base / file).write_text(text)
        found.append(site.content(config))
    for unread in ("README.md", "generation_config.json", "optimizer.safetensors"):
        (base / unread).write_text("{}")
    assert site.content(config) == found[-1]
    digests = {one.pop("the tokenizer's files") for one in found}
    assert len(digests) == 3 and found[0] == found[1] == found[2]


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def site_disk(folder: Path) -> Path:
    """Write a base in two shards and an adapter to start from; return the folder."""
    for name in ("base", "start"):
        (folder / name).mkdir(parents=True)
    (folder / "base" / "config.json").write_text(json.dumps(LLAMA))
    shards = {key: f"model-0000{i}-of-00002.safetensors" for i, key in ((1, "a"), (2, "b"))}
    for key, shard in shards.items():
        save_file({key: np.zeros(2)}, folder / "base" / shard)
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "start" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"a": np.zeros(3)}, folder / "start" / "adapter_model.safetensors")
    return folder


def contents(folder: Path, *overrides: str) -> dict[str, str]:
    """Return what a site whose files lie in this folder compares with the others."""
    places = [f"model.base={folder / 'base'}", f"adapter.start_from={folder / 'start'}"]
    return site.content(load(None, ["model.tokenizer=bytes", *places, *overrides]).config)


def other_shard(folder: Path) -> None:
    save_file({"b": np.ones(2)}, folder / "base" / "model-00002-of-00002.safetensors")


def other_start(folder: Path) -> None:
    save_file({"a": np.full(3, 1e-9)}, folder / "start" / "adapter_model.safetensors")


def other_alpha(folder: Path) -> None:
    (folder / "start" / "adapter_config.json").write_text(json.dumps(ADAPTER | {"lora_alpha": 9}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_config, "the base model's files: "),
        (other_shard, "the base model's files: "),
        (other_start, "the adapter's files: "),
        (other_alpha, "the adapter's files: "),
    ],
)
def test_sites_refuse_another_content_under_the_same_names(tmp_path, change, named):
    """A base in shards, and an adapter to start from."""
    one, other = (site_disk(tmp_path / name) for name in ("one", "other"))
    before = contents(one)
    assert before == contents(other)
    change(other)
    (line,) = site.differences(before, contents(other), "site1")
    assert line.startswith(named) and line.endswith("at site1")


def test_sites_refuse_another_seed(tmp_path):
    """Weights that are drawn, sketches and the choice of clients follow from it."""
    folder = site_disk(tmp_path / "one")
    (line,) = site.differences(contents(folder), contents(folder, "run.seed=1"), "site1")
    assert line == "run.seed: 0 here, 1 at site1"


def test_sites_may_keep_the_same_files_in_other_places(tmp_path):
    """Each site exports an adapter with the path of its own base, and PEFT writes modules in any order."""
    one, other = (site_disk(tmp_path / name) for name in ("one", "other"))
    changed = ADAPTER | {"target_modules": ["v_proj", "q_proj"], "base_model_name_or_path": "/elsewhere"}
    (other / "start" / "adapter_config.json").write_text(json.dumps(changed))
    (other / "base" / "config.json").write_text(json.dumps(LLAMA | {"_name_or_path": "elsewhere"}))
    (other / "base" / "consolidated.safetensors").write_text("that no index names")
    assert contents(one) == contents(other)


def test_sites_compare_a_shipped_base_by_its_content(tmp_path):
    shipped = load(None, ["model.base=gpt3-125m", "model.init=random", "model.tokenizer=bytes"]).config
    path = Path(__file__).parents[2] / "ds_configs" / "models" / "gpt3-125m"
    folder = load(None, [f"model.base={path}", "model.init=random", "model.tokenizer=bytes"]).config
    assert site.content(shipped) == site.content(folder) and "gpt3-125m" not in site.content(shipped).values()

"""Hosts of a job, or sites of a federation, that read different inputs: training does not start."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

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
)


@pytest.mark.parametrize("file", FILES)
def test_sites_compare_all_files_of_a_tokenizer(tmp_path, file):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    config = load(None, [f"model.base={tmp_path / 'base'}", "model.init=random"]).config
    before = site.content(config)
    (tmp_path / "base" / file).write_text("{}")
    after = site.content(config)
    assert {name for name in after if after[name] != before[name]} == {"the tokenizer's files"}


def test_sites_compare_a_shipped_base_by_its_content(tmp_path):
    shipped = load(None, ["model.base=gpt3-125m", "model.init=random", "model.tokenizer=bytes"]).config
    path = Path(__file__).parents[2] / "ds_configs" / "models" / "gpt3-125m"
    folder = load(None, [f"model.base={path}", "model.init=random", "model.tokenizer=bytes"]).config
    assert site.content(shipped) == site.content(folder) and "gpt3-125m" not in site.content(shipped).values()

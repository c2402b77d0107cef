"""What can be checked without starting a rank, importing torch or reading a weight: for `--dry-run`, and before any run starts."""

import json
import os
import re
from pathlib import Path

from fedspeed.cluster.discover import from_process
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.local import local_rank_count
from fedspeed.cluster.topology import Topology, plan, warnings
from fedspeed.config.deepspeed import merge, zero_stage
from fedspeed.config.load import DEFAULT, Loaded
from fedspeed.config.run import RunConfig
from fedspeed.data.clients import client_rows
from fedspeed.data.config import steps_by_cluster
from fedspeed.errors import ConfigError, FedSpeedError, ModelError

QUICKSTART_BASE = "runs/quickstart-base"  # pretrained on the spot where it is missing
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check(loaded: Loaded, hostfile: Path | None) -> str:
    """What would run where, in a few lines.

    Raises:
        FedSpeedError: the first fault of each part, all in one message.
    """
    config = loaded.config
    lines = _all((_place, _model, _adapter, _data, lambda loaded: _layout(loaded, hostfile)), loaded)
    stage = zero_stage(merge(config.deepspeed, config, loaded.folder))
    lines.append(f"engine   DeepSpeed ZeRO-{stage}, {config.federation.rounds} rounds of {config.train.local_steps} local steps")
    return "\n".join(lines)


def check_files(loaded: Loaded) -> None:
    """The part of `check` that one host may fail and another pass, but for the data, which a rank reads anyway."""
    _all((_place, _model, _adapter), loaded)


def check_clusters(config: RunConfig, topology: Topology) -> None:
    """What the configuration says about single clusters must be about clusters that are there."""
    names = [cluster.name for cluster in topology.clusters]
    for name in steps_by_cluster(config.train.local_steps_by_cluster):
        if name not in names:
            raise ConfigError(f"train.local_steps_by_cluster: no cluster {name} takes part; there {'are' if len(names) > 1 else 'is'} "
                              f"{', '.join(names)}")


def _all(parts, loaded: Loaded) -> list[str]:
    lines, faults = [], []
    for part in parts:
        try:
            lines += part(loaded)
        except FedSpeedError as error:
            faults.append(str(error))
    if faults:
        raise FedSpeedError("\n  ".join(faults))
    return lines


def _place(loaded: Loaded) -> list[str]:
    folder = Path(loaded.config.run.out)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise FedSpeedError(f"run.out={folder}: {existing} is not a folder; choose another place for the runs")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FedSpeedError(f"run.out={folder}: {existing} cannot be written to; mend its permissions, or choose another place")
    return []


def _model(loaded: Loaded) -> list[str]:
    model = loaded.config.model
    folder = Path(model.base)
    folder = folder.parent if folder.is_file() else folder
    if model.base == QUICKSTART_BASE and not folder.exists():
        return [f"model    {folder}, pretrained on the spot when the run starts"]
    if not folder.is_dir():
        if HUB_NAME.fullmatch(model.base) and not model.base.startswith((".", "runs/")):
            return [f"model    {model.base}, a hub name: not checked here"]
        raise ModelError(f"model.base: {model.base} does not exist; give a folder with config.json, or a hub name such as org/model")
    kind = _object(folder / "config.json", "model configuration").get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{folder / 'config.json'}: no model_type in it; give the config.json of a Hugging Face causal LM")
    if model.init == "random":
        return [f"model    {folder} ({kind}, weights drawn from run.seed)"]
    files = _weight_files(folder, "model.safetensors")
    for file in files:
        _shapes(file)
    return [f"model    {folder} ({kind}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {len(files)} file(s))"]


def _adapter(loaded: Loaded) -> list[str]:
    """The adapter a run starts from: its files are whole, one LoRA rank stands in all of them, and the configuration wants no other."""
    adapter = loaded.config.adapter
    if not adapter.start_from:
        return []
    folder = Path(adapter.start_from)
    if not folder.is_dir():
        raise ModelError(f"adapter.start_from: {folder} does not exist; give a PEFT folder (adapter_config.json and "
                         "adapter_model.safetensors)")
    saved = _object(folder / "adapter_config.json", "adapter configuration")
    lora_rank = saved.get("r")
    for file in _weight_files(folder, "adapter_model.safetensors"):
        for name, shape in _shapes(file).items():
            if ".lora_A." in name and shape[0] != lora_rank:
                raise ModelError(f"{file}: {name} has shape {tuple(shape)}, but adapter_config.json says r={lora_rank}; the two files "
                                 "belong to different adapters, export it again")
    for key, ours, name in (("lora_rank", adapter.lora_rank, "r"), ("alpha", adapter.alpha, "lora_alpha")):
        source = loaded.sources[f"adapter.{key}"]
        if source != DEFAULT and ours != saved.get(name):
            raise ModelError(f"{source}: adapter.{key}={ours}, but adapter.start_from={folder} has {name}={saved.get(name)}; leave "
                             f"adapter.{key} out, or start from another adapter")
    return [f"adapter  {folder} (r={lora_rank})"]


def _object(path: Path, what: str) -> dict:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; {path.parent} is not a folder with a {what}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a {what} ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a {what} but {type(content).__name__}; copy the folder again")
    return content


def _weight_files(folder: Path, single: str) -> list[Path]:
    """The safetensors that belong to a folder: one, or the shards of its index."""
    index = folder / f"{single}.index.json"
    if index.is_file():
        shards = _object(index, "index of weight shards").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index}: no weight_map in it; copy the folder again")
        return [folder / name for name in sorted(set(shards.values()))]
    if not (folder / single).is_file():
        raise ModelError(f"{folder}: no {single} and no {index.name}; give a folder with safetensors weights"
                         + (", or set model.init=random" if single == "model.safetensors" else ""))
    return [folder / single]


def _shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in a safetensors file, from its header; checks that the file is as long as the header says.

    Format: eight bytes with the header's length, a JSON header, the tensors (https://huggingface.co/docs/safetensors).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if end != size:
            raise ValueError(f"{size} bytes instead of {end}")
        return {name: tensor["shape"] for name, tensor in header.items()}
    except FileNotFoundError:
        raise ModelError(f"{path}: named in the index, but missing; copy the folder again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: truncated or no safetensors file ({error}); copy it again") from error


def _data(loaded: Loaded) -> list[str]:
    config = loaded.config
    rows = client_rows(config.data, config.run.seed)
    counts = ", ".join(f"{len(r.train)}+{len(r.val)}" for r in rows[:16]) + (", ..." if len(rows) > 16 else "")
    return [f"data     {config.data.task}: {len(rows)} clients, training + held-out rows {counts}"]


def _layout(loaded: Loaded, hostfile: Path | None) -> list[str]:
    config, launch = loaded.config, from_process(hostfile)
    hosts = launch.hosts
    if launch.kind == "none" and launch.hostfile is None:
        hosts = (Host("localhost", local_rank_count(config.cluster.local_ranks, config.data.clients)),)
    topology = plan(hosts, config.data.clients, config.cluster.ranks_per_client)
    check_clusters(config, topology)
    return [f"cluster  {c.name}: {len(c.ranks)} ranks, clients {_ranges(c.clients)}" for c in topology.clusters] + _idle(topology)


def _idle(topology: Topology) -> list[str]:
    return [f"idle     {text}" for text in warnings(topology)]


def _ranges(numbers: tuple[int, ...]) -> str:
    """Clients of a cluster are consecutive."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

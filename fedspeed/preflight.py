"""`--dry-run`: everything that can be checked without starting a rank, importing torch or reading a weight."""

import json
from pathlib import Path

from fedspeed.cluster.discover import from_process
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.local import local_rank_count
from fedspeed.cluster.topology import Topology, plan, warnings
from fedspeed.config.deepspeed import merge, zero_stage
from fedspeed.config.load import Loaded
from fedspeed.data.clients import client_rows
from fedspeed.errors import FedSpeedError, ModelError


def check(loaded: Loaded, hostfile: Path | None) -> str:
    """What would run where, in a few lines.

    Raises:
        FedSpeedError: the first fault of each part, all in one message.
    """
    config, faults, lines = loaded.config, [], []
    for part in (_model, _data, _layout):
        try:
            lines += part(loaded, hostfile)
        except FedSpeedError as error:
            faults.append(str(error))
    if faults:
        raise FedSpeedError("\n  ".join(faults))
    stage = zero_stage(merge(config.deepspeed, config, loaded.folder))
    lines.append(f"engine   DeepSpeed ZeRO-{stage}, {config.federation.rounds} rounds of {config.train.local_steps} local steps")
    return "\n".join([*lines, "nothing was started"])


def _model(loaded: Loaded, _) -> list[str]:
    model = loaded.config.model
    folder = Path(model.base)
    folder = folder.parent if folder.is_file() else folder
    if not folder.is_dir():
        if model.base.count("/") == 1 and not model.base.startswith((".", "runs/")):
            return [f"model    {model.base}, a hub name: not checked here"]
        raise ModelError(f"model.base: {model.base} does not exist; give a folder with config.json, or a hub name such as org/model")
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / 'config.json'}: not a model configuration ({error!r})") from error
    weights = sorted(folder.glob("*.safetensors"))
    if model.init == "pretrained" and not weights:
        raise ModelError(f"{folder}: no *.safetensors; give a folder with weights, or set model.init=random")
    if model.init == "random":
        return [f"model    {folder} ({kind}, weights drawn from run.seed)"]
    return [f"model    {folder} ({kind}, {sum(w.stat().st_size for w in weights) / 1e6:.1f} MB in {len(weights)} file(s))"]


def _data(loaded: Loaded, _) -> list[str]:
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
    return [f"cluster  {c.name}: {len(c.ranks)} ranks, clients {_ranges(c.clients)}" for c in topology.clusters] + _idle(topology)


def _idle(topology: Topology) -> list[str]:
    return [f"idle     {text}" for text in warnings(topology)]


def _ranges(numbers: tuple[int, ...]) -> str:
    """Clients of a cluster are consecutive."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

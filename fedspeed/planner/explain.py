"""A plan as text for people, and as plain values for programs. Pure."""

import dataclasses
from collections.abc import Sequence

from fedspeed.config.spelling import flow
from fedspeed.models.families.shape import ModelShape
from fedspeed.planner.hardware import GIB
from fedspeed.planner.memory import sizes, slots_of
from fedspeed.planner.pipeline.division import client_traffic, divide
from fedspeed.planner.plan import SLOTTED, Forecast, Memory, Plan, RankProfile, Setting, Task, overrides
from fedspeed.schedule.limits import QUANTISED
from fedspeed.schedule.loads import spread
from fedspeed.units import bytes_text, parameters_text

CAUSES = {
    "forward": "arithmetic, forward",
    "again": "arithmetic, blocks again",
    "gradients": "arithmetic, gradients",
    "head": "head and loss",
    "block inputs": "waiting for block inputs",
    "waiting for loads": "waiting for loads",
    "optimizer": "optimizer",
    "client's ranks": "gradients over a client's ranks",
}
WHERE = {
    "stock": "on every rank's device, executed by DeepSpeed",
    "resident": "on every rank's device",
    "ram": "one copy in each node's RAM",
    "nvme": "one copy on each node's NVMe",
    "client": "divided over the ranks of each client",
    "cluster": "divided over the ranks of the cluster",
    "int8": "on every rank's device in 8 bits",
    "nf4": "on every rank's device in 4 bits",
}


def explain(plan: Plan) -> str:
    """Describe a whole plan as text."""
    parts = [
        _head(plan),
        _clusters(plan),
        _clients(plan),
        _blocks(plan.task, plan.setting),
        _stages(plan),
        _memory(plan),
        _seconds(plan),
        _alternatives(plan),
    ]
    parts += [_preferred(plan), _overrides(plan)]
    if plan.notes:
        parts.append("Assumed or worth knowing\n" + "\n".join(f"  {note}" for note in plan.notes))
    return "\n\n".join(part for part in parts if part)


def _dimensions(shape: ModelShape) -> dict:
    """Return the dimensions of a model by name, those of its experts included, without its modules."""
    values = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape) if field.repr}
    if shape.experts is not None:
        values["experts"] = dataclasses.asdict(shape.experts)
    return values


def as_values(plan: Plan) -> dict:
    """Return a plan as dicts, lists, numbers and texts, with sums."""

    def forecast(f: Forecast) -> dict:
        return {
            "memory": dataclasses.asdict(f.memory)
            | {
                "gpu_bytes": f.memory.gpu_bytes,
                "ram_bytes": f.memory.ram_bytes,
                "nvme_bytes": f.memory.nvme_bytes,
            },
            "usable": {
                "gpu_bytes": f.tightest.node.device.memory,
                "ram_bytes": f.tightest.node.ram,
                "nvme_bytes": f.tightest.node.nvme,
            },
            "seconds": {
                "causes": f.seconds.causes,
                "total": f.seconds.total,
                "loads": f.seconds.loads,
                "hidden": f.seconds.hidden,
                "waited": f.seconds.waited,
                "exchange_a_round": f.seconds.exchange,
            },
        }

    task = dataclasses.asdict(plan.task) | {
        "shape": _dimensions(plan.task.shape),
        "parameters": plan.task.shape.total,
        "active_parameters": plan.task.shape.active,
        "trainable": plan.task.trainable,
    }
    clusters = [
        {
            "name": c.name,
            "ranks": list(plan.topology.cluster_of(c.name).ranks),
            "clients": list(plan.topology.cluster_of(c.name).clients),
            **forecast(c.forecast),
            "own": {
                "setting": dataclasses.asdict(c.preferred),
                "overrides": list(overrides(plan.task, c.preferred)),
                **forecast(c.preferred_forecast),
            },
        }
        for c in plan.clusters
    ]
    clients = [dataclasses.asdict(client) for client in plan.topology.clients]
    return {
        "task": task,
        "setting": dataclasses.asdict(plan.setting),
        "blocks": _ranges(plan.task, plan.setting),
        "stages": {c.name: [_cuts(plan, profile) for profile in c.profiles] for c in plan.clusters},
        "clusters": clusters,
        "clients": clients,
        "alternatives": [dataclasses.asdict(a) for a in plan.alternatives],
        "overrides": list(plan.overrides),
        "notes": list(plan.notes),
    }


def _head(plan: Plan) -> str:
    task = plan.task
    setting = plan.setting
    trained = "all parameters train"
    if task.method == "lora":
        trained = (
            f"LoRA r={task.lora_rank} on {flow(task.targets)}, {parameters_text(task.trainable)} parameters"
        )
    return (
        f"{task.shape.name}: {task.shape.size_text}, "
        f"{bytes_text(task.shape.total * task.type_bytes)} in {task.dtype}; {trained}\n"
        f"A step of a client: {task.rows} rows of {task.tokens} tokens on each of its ranks, as "
        f"{setting.accumulation} micro-batch"
        f"{'es' if setting.accumulation > 1 else ''} of {setting.micro_batch}\n"
        f"Tier {setting.tier}: the base is stored "
        f"{WHERE[setting.tier] if task.method == 'lora' else WHERE['stock']}"
    )


def _clusters(plan: Plan) -> str:
    rows = []
    for c in plan.clusters:
        cluster = plan.topology.cluster_of(c.name)
        memory = c.forecast.memory
        node = c.forecast.tightest.node
        hosts = len({plan.topology.placement(rank).host for rank in cluster.ranks})
        tokens = (
            max(profile.carried for profile in c.profiles)
            * plan.task.rows
            * plan.task.tokens
            / c.forecast.seconds.total
        )
        rows.append([
            c.name,
            node.device.name,
            hosts,
            len(cluster.ranks),
            len(cluster.clients),
            _of(memory.gpu_bytes, node.device.memory),
            _of(memory.ram_bytes, node.ram),
            _of(memory.nvme_bytes, node.nvme),
            f"{c.forecast.seconds.total:.2f} s",
            f"{tokens:.0f}",
        ])
    return "Clusters (peak of usable GiB)\n" + table(
        [
            "cluster",
            "device",
            "hosts",
            "ranks",
            "clients",
            "GPU a rank",
            "RAM a node",
            "NVMe a node",
            "step",
            "tokens/s a rank",
        ],
        rows,
    )


def _of(used: int, usable: int) -> str:
    return f"{used / GIB:.1f} of {usable / GIB:.1f}" if usable or used else "-"


def _clients(plan: Plan) -> str:
    rows: list[list] = []
    for client in plan.topology.clients:
        host = plan.topology.placement(client.gateway).host
        shared = len(plan.topology.placement(client.gateway).clients)
        rows.append([
            client.client,
            client.cluster,
            host,
            ",".join(map(str, client.ranks)),
            f"shared by {shared}" if shared > 1 else "alone",
        ])
    idle = f"\n  idle ranks: {', '.join(map(str, plan.topology.idle))}" if plan.topology.idle else ""
    return "Clients on ranks\n" + table(["client", "cluster", "host", "world ranks", ""], rows) + idle


def _ranges(task: Task, setting: Setting) -> dict[str, str]:
    """Return where the units of the base are stored: units -> description."""
    n = task.shape.layers
    if setting.tier not in SLOTTED:
        return {f"embedding, blocks 0-{n - 1}, head": "device"}
    resident = spread(n, setting.resident_blocks) if setting.resident_blocks else []
    where = f"device, in {setting.tier}" if setting.tier in QUANTISED else setting.tier
    places: dict[str, str] = {}
    if resident:
        places[f"block{'s' if len(resident) > 1 else ''} {', '.join(map(str, resident))}"] = "device"
    others = "the other blocks" if resident else _range(0, n - 1)
    places[others] = f"{where}, through {slots_of(task, setting)} slots on the device"
    if setting.tier in ("ram", "nvme"):
        places["embedding"] = f"{setting.tier}, read there row by row"
        places["head"] = f"{setting.tier}, loaded once into a slot of its own" + (
            " (it is the embedding)" if task.shape.tied else ""
        )
    elif setting.tier in QUANTISED:
        places["embedding, head"] = "device"
    else:
        places["embedding, head"] = f"{setting.tier}, " + (
            "one tensor, loaded once into a slot"
            if task.shape.tied
            else "in turn through a slot of their own"
        )
    return places


def _range(first: int, last: int) -> str:
    return f"block {first}" if first == last else f"blocks {first}-{last}"


def _blocks(task: Task, setting: Setting) -> str:
    unit = sizes(task.shape, task.type_bytes)
    return f"Tier of each block (a block: {unit.block / GIB:.3f} GiB)\n" + table(
        ["", "where"], [[units, where] for units, where in _ranges(task, setting).items()]
    )


def _stages(plan: Plan) -> str:
    """List where the ranks of a client would cut the model as a pipeline."""
    rows = []
    for c in plan.clusters:
        for profile in c.profiles:
            cuts = _cuts(plan, profile)
            stages = (
                " | ".join(_range(a, b - 1) for a, b in zip(cuts, cuts[1:]))
                if cuts
                else "does not fit: the ranks do not hold the blocks together"
            )
            rows.append([c.name, profile.client_ranks, stages])
    return "Stage boundaries with engine.pipeline=client\n" + table(["cluster", "stages", ""], rows)


def _cuts(plan: Plan, profile: RankProfile) -> tuple[int, ...] | None:
    recompute = plan.setting.tier != "stock" or plan.setting.checkpointing
    return divide(
        plan.task,
        [profile] * profile.client_ranks,
        client_traffic(profile.client_ranks, plan.setting.micro_batch, plan.setting.accumulation, recompute),
    )


def _memory(plan: Plan) -> str:
    parts = []
    for title, pick in (
        ("GPU bytes of the fullest rank", lambda m: m.gpu),
        ("RAM of its node", lambda m: m.ram),
        ("NVMe of its node", lambda m: m.nvme),
    ):
        memories: list[Memory] = [c.forecast.memory for c in plan.clusters]
        causes = sorted(
            {cause for m in memories for cause in pick(m)},
            key=lambda cause: -max(pick(m).get(cause, 0) for m in memories),
        )
        if causes:
            rows = [[cause, *(f"{pick(m).get(cause, 0) / GIB:.2f}" for m in memories)] for cause in causes]
            rows.append(["peak", *(f"{sum(pick(m).values()) / GIB:.2f}" for m in memories)])
            parts.append(f"{title} [GiB]\n" + table(["", *(c.name for c in plan.clusters)], rows))
    return "\n\n".join(parts)


def _seconds(plan: Plan) -> str:
    seconds = [c.forecast.seconds for c in plan.clusters]
    rows = [
        [title, *(f"{s.causes.get(cause, 0.0):.3f}" for s in seconds)]
        for cause, title in CAUSES.items()
        if any(s.causes.get(cause) for s in seconds)
    ]
    rows.append(["a step of all clients of a rank", *(f"{s.total:.3f}" for s in seconds)])
    rows.append(["loads, hidden behind arithmetic", *(f"{s.hidden:.3f} of {s.loads:.3f}" for s in seconds)])
    rows.append(["exchange, once a round", *(f"{s.exchange:.3f}" for s in seconds)])
    return "Seconds of one optimizer step, slowest rank\n" + table(
        ["", *(c.name for c in plan.clusters)], rows
    )


def _alternatives(plan: Plan) -> str:
    return (
        "Weighed and left\n" + table(["", "why"], [[a.label, a.reason] for a in plan.alternatives])
        if plan.alternatives
        else ""
    )


def _preferred(plan: Plan) -> str:
    """List the clusters for which another setting would be faster. A run has one engine section, so that they
    cannot have it.
    """
    differing = [c for c in plan.clusters if c.preferred != plan.setting]
    lines = [
        f"  {c.name} by itself: {c.preferred_forecast.seconds.total:.2f} s a step instead of "
        f"{c.forecast.seconds.total:.2f} s with "
        f"{' '.join(c.preferred.overrides)}"
        for c in differing
    ]
    return (
        "\n".join(["One setting serves all clusters, the slowest of which ends the round", *lines])
        if lines
        else ""
    )


def _overrides(plan: Plan) -> str:
    return "Put behind the run's command\n  " + " ".join(plan.overrides)


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Format a table with aligned columns, numbers to the right."""
    texts = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(head))]
    right = [
        i > 0 and all(row[i][:1].isdigit() or row[i] in ("-", "") for row in texts[1:])
        for i in range(len(head))
    ]
    return "\n".join(
        "  "
        + "  ".join(
            cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right)
        ).rstrip()
        for row in texts
    )

"""Arguments that `plan` and `simulate` share, and the task that they describe."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedspeed.cli.arguments import file_name
from fedspeed.errors import PlanError

if TYPE_CHECKING:
    from fedspeed.cluster.hostfile import Host
    from fedspeed.cluster.topology import Topology
    from fedspeed.planner.hardware import Node
    from fedspeed.planner.plan import Task


def add_planned_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `plan` and `simulate` share."""
    parser.add_argument("--hostfile", type=file_name, required=True, help="the hosts and their facts")
    parser.add_argument(
        "--config", type=file_name, metavar="YAML", help="configuration of a run, to take its values from"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="values over the configuration's, such as adapter.lora_rank=16",
    )
    parser.add_argument("--tokens", type=int, help="length of a sequence (data.max_tokens)")
    parser.add_argument(
        "--rows",
        type=int,
        help="sequences of an optimizer step on each rank (default: train.micro_batch x train.accumulation)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="numeric type (default: as model.dtype says; auto: the lowest that all cards have)",
    )
    parser.add_argument(
        "--probe",
        type=file_name,
        action="append",
        default=[],
        metavar="FILE",
        help="what `fedspeed probe` wrote; once for each machine",
    )


def planned_task(
    arguments: argparse.Namespace,
    model: str | None,
    clients: int | None,
    micro_batch: int | None = None,
    quantised: bool = False,
    *,
    hosts: "Sequence[Host] | None" = None,
    overrides: Sequence[str] = (),
) -> "tuple[Task, Topology, dict[str, Node]]":
    """Return the task, the placement of clients and the hosts' hardware that the arguments describe.

    Args:
        arguments: of the command.
        model: None: as configured.
        clients: None: as configured; one client per host without a configuration.
        micro_batch: None: the plan chooses it.
        quantised: whether to consider a base in 8 and 4 bits.
        hosts: None: those of the hostfile.
        overrides: overrides of configuration keys, which take precedence over the user's.

    Raises:
        FedSpeedError: hostfile, configuration or arguments are wrong.
    """
    from fedspeed.cluster import topology
    from fedspeed.cluster.hostfile import read
    from fedspeed.config.deepspeed import merge
    from fedspeed.config.load import load
    from fedspeed.models.planned_shape import planned_shape
    from fedspeed.planner.hardware import node_of
    from fedspeed.planner.task import task_of
    from fedspeed.session.planner_inputs import read_probe_file

    flags = {
        "model.base": model,
        "data.clients": clients,
        "data.max_tokens": arguments.tokens,
        "model.dtype": arguments.dtype,
    }
    hosts = hosts or read(arguments.hostfile).hosts
    defaults = [] if arguments.config else [f"data.clients={len(hosts)}"]
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    loaded = load(arguments.config, [*defaults, *arguments.overrides, *given, *overrides])
    for name, value in (("rows", arguments.rows), ("micro-batch", micro_batch)):
        if value is not None and value < 1:
            raise PlanError(f"--{name}={value}: must be at least 1")
    probes = [read_probe_file(path) for path in arguments.probe]
    places = topology.place_clients(hosts, loaded.config.data.clients, loaded.config.cluster.ranks_per_client)
    working = {place.host for place in places.ranks if place.clients}
    nodes = {host.name: node_of(host, probes) for host in hosts if host.name in working}
    task = task_of(
        loaded.config,
        merge(loaded.config.deepspeed, loaded.config, loaded.folder),
        planned_shape(loaded.config.model.base),
        [node.device for node in nodes.values()],
        rows=arguments.rows,
        micro_batch=micro_batch,
        quantised=quantised,
    )
    return task, places, nodes

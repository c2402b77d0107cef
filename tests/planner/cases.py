"""Hosts, tasks and profiles that the planner's tests share."""

from fedspeed.cluster.hostfile import parse, read
from fedspeed.cluster.topology import place_clients
from fedspeed.models.catalogue import shape_of
from fedspeed.planner.hardware import common_type, node_of
from fedspeed.planner.plan import Task
from fedspeed.planner.profiles import profiles_of
from fedspeed.planner.search import plan
from tests.conftest import ROOT

HUB = "deepseek-ai/DeepSeek-R1-Distill-"
FIVE = (f"{HUB}Qwen-1.5B", f"{HUB}Qwen-7B", f"{HUB}Llama-8B", f"{HUB}Qwen-14B", "gpt3-13b")


def one_host(facts="gpu=rtx3090 ram_gib=64", slots=2):
    return parse(f"alone slots={slots}\n# fed-host alone {facts}\n", "test").hosts


def laid(hosts, clients):
    """Return the topology of clients on hosts and the nodes."""
    topology = place_clients(hosts, clients, "auto")
    busy = {rank.host for rank in topology.ranks if rank.clients}
    return topology, {host.name: node_of(host) for host in hosts if host.name in busy}


def shipped(name, clients, model, **task):
    """Return the plan for a model on a hostfile of the repository."""
    topology, nodes = laid(read(ROOT / "hostfiles" / name).hosts, clients)
    dtype = common_type([node.device for node in nodes.values()], "auto")
    return plan(Task(shape_of(model), clients, dtype=dtype, **task), topology, nodes)


def one_profile(facts="gpu=rtx3090 ram_gib=64", slots=2, clients=1):
    """Return the profile of a host whose ranks all have the same one."""
    topology, nodes = laid(one_host(facts, slots), clients)
    (profiles,) = profiles_of(topology, nodes).values()
    (profile,) = profiles
    return profile

"""A rank that meets the others, joins the torch world of its cluster and prints what it saw as JSON.

Argument: the hostfile.
"""

import json
import os
import socket
import sys
from pathlib import Path

from fedspeed.cluster.discover import from_process
from fedspeed.cluster.rendezvous import leave, meet, publish, published
from fedspeed.cluster.topology import place_clients
from fedspeed.cluster.torch_world import torch_world_env
from fedspeed.engine.world import join_world, leave_world
from tests.listening import listening_sockets

launch = from_process(Path(sys.argv[1]))
store = meet(launch, 120)
topology = place_clients(launch.hosts, 3, "auto")
cluster = topology.cluster_of(topology.placement(launch.world_rank).cluster)
world = torch_world_env(store, cluster.ranks, launch, 120)
os.environ.update(world)

import torch  # noqa: E402 - after the environment of the torch world
import torch.distributed as dist  # noqa: E402


def is_free(port: int) -> bool:
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            thief.bind(("", port))
            thief.listen()
        except OSError:
            return False
        return True


stolen = "MASTER_PORT" in world and is_free(int(world["MASTER_PORT"]))
join_world(120)
total = torch.ones(1) * (launch.world_rank + 1)
dist.all_reduce(total)
publish(store, f"round/7/{launch.world_rank}", "there")
store.wait([f"round/7/{rank}" for rank in range(3)], 120)
pids = [peer.pid for peer in store.peers]
seen = {"rank": launch.world_rank, "pid": os.getpid(), "pids": pids, "world": world, "sum": total.item()}
seen |= {"stolen": stolen, "seen": sorted(published(store, "round/7", range(4)))}
seen["listening"] = listening_sockets([os.getpid()])
print(json.dumps(seen), flush=True)
leave_world()
assert leave(store, 120) == set()

"""The environment from which the ranks of one cluster form their torch world (torch.distributed)."""

import json
from collections.abc import Sequence

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.rendezvous import Store
from fedspeed.cluster.store_connection import open_server, ranks_text
from fedspeed.cluster.store_values import read_values
from fedspeed.errors import LostPeerError
from fedspeed.net.interfaces import GLOO_INTERFACE, LOOPBACK, NCCL_INTERFACE, interface_of


def torch_world_env(store: Store, ranks: Sequence[int], launch: Launch, timeout_s: float) -> dict[str, str]:
    """Return the environment of this rank's torch world, to be set before torch.distributed is initialised.

    RANK and WORLD_SIZE count in that world. LOCAL_RANK and LOCAL_SIZE remain the machine's, as the launcher
    numbered its ranks: they choose the accelerator and divide the cores, and DeepSpeed requires that
    LOCAL_RANK equals Open MPI's. CROSS_RANK and CROSS_SIZE count the machines of the world.

    A world of several ranks also gets MASTER_ADDR and MASTER_PORT, those of a store that the first rank has
    already opened and keeps open: where torch opens a store on the same port, it shares the server. The world
    lives as long as `store`. A world of one rank needs no store on the network.

    GLOO_SOCKET_IFNAME, and for a world on one machine NCCL_SOCKET_IFNAME, name the interface that the world
    communicates through: loopback on one machine.

    Args:
        ranks: the world ranks of that world in order, this one among them.

    Raises:
        LostPeerError: the first of them did not open its store before the timeout.
        HostfileError: the interface of this machine's address cannot be found.
    """
    world_rank = store.world_rank
    machine = store.peers[world_rank].machine
    machines = list(dict.fromkeys(store.peers[rank].machine for rank in ranks))
    env = {
        "RANK": str(ranks.index(world_rank)),
        "WORLD_SIZE": str(len(ranks)),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_SIZE": str(sum(peer.machine == machine for peer in store.peers)),
        "CROSS_RANK": str(machines.index(machine)),
        "CROSS_SIZE": str(len(machines)),
        GLOO_INTERFACE: store.interfaces(ranks),
    }
    if len(machines) == 1:
        env[NCCL_INTERFACE] = f"={interface_of(LOOPBACK)}"  # NCCL takes a name without = for a prefix
    if len(ranks) > 1:
        address, port = _world_store(store, ranks, launch, timeout_s)
        env |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return env


def _world_store(store: Store, ranks: Sequence[int], launch: Launch, timeout_s: float) -> tuple[str, int]:
    """Open the store of a torch world on its first rank; return its (host, port) as this rank reaches it."""
    first = ranks[0]
    key = f"fedspeed/world/{first}"
    if store.world_rank == first:
        address = store.listen_address(ranks)
        try:
            store.world_server = open_server(address, 0, timeout_s)
        except OSError as error:
            raise LostPeerError(f"cannot listen on {address}: {error.strerror or error}") from error
        store.put(key, json.dumps([address, store.world_server.port]))
    elif store.wait([key], timeout_s):
        raise LostPeerError(
            f"{ranks_text(launch, [first])} did not open the torch world of ranks "
            f"{', '.join(map(str, ranks))} within {timeout_s:g} s; look at its output"
        )
    [(address, port)] = read_values(store, [key], _address)
    there = store.peers[first].machine
    if there == store.peers[0].machine != store.peers[store.world_rank].machine:
        return store.address[0], port  # as this rank resolves the name of that machine
    return address, port


def _address(text: str) -> tuple[str, int]:
    host, port = json.loads(text)
    return str(host), int(port)

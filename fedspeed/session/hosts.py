"""Comparison of the inputs between the hosts of a job, each of which reads them from its own disk."""

import json
from collections.abc import Sequence

from fedspeed.cluster.rendezvous import Store
from fedspeed.cluster.store_values import read_values
from fedspeed.data.clients import ClientRows
from fedspeed.errors import FedSpeedError
from fedspeed.session.input_digests import ROWS, descriptions, digests
from fedspeed.session.request import Job


def several_hosts(job: Job) -> bool:
    """Return whether the working ranks are on more than one host."""
    return len(_first_ranks(job)) > 1


def publish_digests(job: Job, store: Store, all_clients: Sequence[ClientRows]) -> None:
    """Publish digests of the inputs of this host; its first working rank does so.

    Args:
        all_clients: the rows of all clients, as this host reads them.
    """
    if job.world_rank in _first_ranks(job).values():
        store.put(
            _key(job.world_rank), json.dumps(digests(job.config, None if job.is_server else all_clients))
        )


def check_hosts(job: Job, store: Store) -> None:
    """Compare the inputs of all hosts, after all have published their digests.

    The host of a server has no rows of clients.

    Raises:
        FedSpeedError: inputs of a host differ from those of the first host; names the host and the inputs.
    """
    firsts = _first_ranks(job)
    found = dict(zip(firsts, read_values(store, map(_key, firsts.values()), _digests), strict=True))
    server = {job.topology.placement(rank).host for rank in job.topology.server}
    carrying = [host for host in firsts if host not in server]
    first = carrying[0]
    differing = []
    for host in firsts:
        texts = [
            text
            for name, text in descriptions(job.config).items()
            if found[host].get(name) != found[first].get(name) and not (name == ROWS and host in server)
        ]
        if texts:
            differing.append(f"host {host} has read another content than host {first}: {'; '.join(texts)}")
    if differing:
        raise FedSpeedError(f"{'. '.join(differing)}. Copy the right ones to all hosts")


def _first_ranks(job: Job) -> dict[str, int]:
    """Return host -> its first working rank, in the order of ranks."""
    found: dict[str, int] = {}
    for rank in job.workers:
        found.setdefault(job.topology.placement(rank).host, rank)
    return found


def _digests(text: str) -> dict[str, str]:
    return {str(name): str(digest) for name, digest in json.loads(text).items()}


def _key(rank: int) -> str:
    return f"read by/{rank}"

"""Whether all hosts of a job read the same: base, tokenizer, adapter and rows lie on each host's own disk."""

import json
from collections.abc import Sequence

from fedspeed.cluster.rendezvous import Store
from fedspeed.data.clients import ClientRows
from fedspeed.errors import FedSpeedError
from fedspeed.session.inputs import ROWS, digests, words
from fedspeed.session.request import Job


def several_hosts(job: Job) -> bool:
    """Whether ranks of more than one host work."""
    return len(_first_ranks(job)) > 1


def publish_digests(job: Job, store: Store, everyone: Sequence[ClientRows]) -> None:
    """Tell the other hosts what this one has read; its first working rank does so for all.

    Args:
        everyone: the rows of all clients, as this host reads them.
    """
    if job.world_rank in _first_ranks(job).values():
        store.put(_key(job.world_rank), json.dumps(digests(job.config, None if job.is_server else everyone)))


def check_hosts(job: Job, store: Store) -> None:
    """Compare what all hosts have read, once all have told. A server's host has read no rows of clients.

    Raises:
        FedSpeedError: some have read something else than the first one; says which host, and what.
    """
    firsts = _first_ranks(job)
    found = dict(zip(firsts, map(json.loads, store.get(*map(_key, firsts.values()))), strict=True))
    server = {job.topology.placement(rank).host for rank in job.topology.server}
    carrying = [host for host in firsts if host not in server]
    first = carrying[0]
    differing = []
    for host in firsts:
        texts = [
            text
            for name, text in words(job.config).items()
            if found[host].get(name) != found[first].get(name) and not (name == ROWS and host in server)
        ]
        if texts:
            differing.append(f"host {host} has read another content than host {first}: {'; '.join(texts)}")
    if differing:
        raise FedSpeedError(f"{'. '.join(differing)}. Copy those that are meant to all hosts")


def _first_ranks(job: Job) -> dict[str, int]:
    """Host -> its first rank that works, in the order of ranks."""
    found: dict[str, int] = {}
    for rank in job.workers:
        found.setdefault(job.topology.placement(rank).host, rank)
    return found


def _key(rank: int) -> str:
    return f"read by/{rank}"

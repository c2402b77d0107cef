"""Which ranks compute on which GPUs, told to all before anything is built."""

import json
from dataclasses import asdict

from fedspeed.cluster.cards import Card, check_cards
from fedspeed.cluster.rendezvous import Store
from fedspeed.engine import device_types
from fedspeed.session.coordination import CheckIn
from fedspeed.session.request import Job


def may_share_cards(job: Job) -> bool:
    """Whether there are ranks that could share a card."""
    return len(job.workers) > 1


def publish_card(job: Job, store: Store) -> None:
    """Leave word of the card that this rank computes on. Collective over the ranks that carry clients; rank 0
    passes the check-in in any case.
    """
    if not may_share_cards(job):
        return
    with CheckIn(job, store, "cards"):
        card = device_types.own_card(job.launch.local_rank)
        store.put(_key(job.world_rank), json.dumps(asdict(card) if card else None))


def check_shared(job: Job, store: Store) -> tuple[list[str], int]:
    """Hold what all ranks have told against the torch worlds that they are to form, with the same result on
    all of them.

    Returns:
        (a line for each card that several torch worlds share, how many ranks compute on this rank's device).

    Raises:
        ConfigError: two ranks of one torch world would compute on one card.
    """
    if not may_share_cards(job):
        return [], 1
    told = [json.loads(text) for text in store.get(*map(_key, job.workers))]
    cards = {rank: Card(**words) for rank, words in zip(job.workers, told, strict=True) if words}
    notes = check_cards(job.topology.worlds(job.config.engine.pipeline), cards)
    if job.world_rank not in cards:  # it computes on its host, with all ranks there
        return notes, sum(job.topology.placement(rank).host == job.place.host for rank in job.workers)
    return notes, list(cards.values()).count(cards[job.world_rank])


def _key(rank: int) -> str:
    return f"card/{rank}"

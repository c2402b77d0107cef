"""Exchange of which ranks compute on which GPU, before anything is built."""

import json
from dataclasses import asdict

from fedspeed.cluster.cards import Card, check_cards
from fedspeed.cluster.rendezvous import Store
from fedspeed.engine import device_types
from fedspeed.session.coordination import CheckIn
from fedspeed.session.request import Job


def may_share_cards(job: Job) -> bool:
    """Return whether there are several working ranks, which could share a card."""
    return len(job.workers) > 1


def publish_card(job: Job, store: Store) -> None:
    """Publish the card that this rank computes on. Collective over the required ranks."""
    if not may_share_cards(job):
        return
    with CheckIn(job, store, "cards"):
        card = device_types.own_card(job.launch.local_rank)
        store.put(_key(job.world_rank), json.dumps(asdict(card) if card else None))


def check_shared(job: Job, store: Store) -> tuple[list[str], int]:
    """Compare the published cards with the planned torch worlds. The result is the same on all ranks.

    Returns:
        (a remark for each card that several torch worlds share, number of ranks on this rank's device).

    Raises:
        ConfigError: two ranks of one torch world would compute on one card.
    """
    if not may_share_cards(job):
        return [], 1
    published = [json.loads(text) for text in store.get(*map(_key, job.workers))]
    cards = {rank: Card(**card) for rank, card in zip(job.workers, published, strict=True) if card}
    notes = check_cards(job.topology.worlds(job.config.engine.pipeline), cards)
    if job.world_rank not in cards:  # it computes on the CPUs of its host, as do all other ranks there
        return notes, sum(job.topology.placement(rank).host == job.place.host for rank in job.workers)
    return notes, list(cards.values()).count(cards[job.world_rank])


def _key(rank: int) -> str:
    return f"card/{rank}"

"""Which device of its machine a rank takes, and which ranks may take the same one. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedspeed.errors import ConfigError

REMEDY_PAGE = "docs/gpu.md"


@dataclass(frozen=True)
class Card:
    """A GPU as ranks tell it from others.

    Attributes:
        name: the same for two ranks exactly where they mean the same GPU.
        host: the machine it is in, as a message names it.
        seen: how many GPUs a rank there sees.
    """

    name: str
    host: str = field(compare=False, default="")
    seen: int = field(compare=False, default=1)


def device_index(local_rank: int, seen: int) -> int:
    """Return the index of the device that a rank computes on, among those that its process sees.

    A launcher that shows each rank one device shows it as number 0. Where there are more ranks than devices,
    they are assigned round robin, so that ranks which stand beside each other share none.

    Args:
        local_rank: as the launcher numbers the ranks of a machine.
        seen: how many devices this process sees; 0 counts as one.
    """
    return local_rank % max(1, seen)


def cards_of_ranks(ranks: int, seen: int, host: str) -> dict[int, Card]:
    """Return the card of each rank of a machine whose ranks all see the same cards."""
    return {rank: Card(f"GPU {device_index(rank, seen)}", host, seen) for rank in range(ranks)}


def check_cards(worlds: Mapping[str, Sequence[int]], cards: Mapping[int, Card]) -> list[str]:
    """Hold the cards of all ranks against the torch worlds that they are to form.

    Args:
        worlds: the ranks of each world, by its name in messages.
        cards: of the ranks that compute on one.

    Returns:
        a line for each card that ranks of several worlds share, which they may.

    Raises:
        ConfigError: two ranks of one world would share a card, which NCCL refuses too, but late.
    """
    problems = []
    notes = []
    world_of = {rank: world for world, ranks in worlds.items() for rank in ranks if rank in cards}
    for card, ranks in _by_card(world_of, cards).items():
        if len(ranks) < 2:
            continue
        shared = [world for world in worlds if [world_of[rank] for rank in ranks].count(world) > 1]
        if shared:
            together = [rank for rank in ranks if world_of[rank] == shared[0]]
            problems.append(_problem(shared[0], card, together))
        else:
            notes.append(
                f"ranks {_listed(ranks)} share {card.name} of {card.host}: each is of another torch "
                "world, so that they may. The card's memory must hold them all, and they take turns"
            )
    if problems:
        raise ConfigError(problems[0])
    return notes


def _by_card(ranks: Sequence[int] | Mapping, cards: Mapping[int, Card]) -> dict[Card, list[int]]:
    found: dict[Card, list[int]] = {}
    for rank in sorted(ranks):
        found.setdefault(cards[rank], []).append(rank)
    return found


def _problem(world: str, card: Card, ranks: Sequence[int]) -> str:
    plural = "s" if card.seen != 1 else ""
    return (
        f"host {card.host}: ranks {_listed(ranks)} of {world} would compute on one GPU ({card.name}; a "
        f"rank there sees {card.seen} GPU{plural}), but a torch world needs one for each of its ranks. Start "
        f"{card.seen} rank{plural} on that host (cluster.local_ranks={card.seen}, slots={card.seen} in the "
        f"hostfile, --num_gpus {card.seen}), where clients take turns; or make each rank a cluster of its "
        "own "
        f"in a hostfile, since such ranks may share a card ({REMEDY_PAGE})"
    )


def _listed(ranks: Sequence[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"

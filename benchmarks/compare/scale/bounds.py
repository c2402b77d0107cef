"""What bounds a round: decided from the seconds that each resource is busy. Pure."""

from collections.abc import Mapping

FEW = 0.5  # a resource that is busy for a smaller share of a round does not bound it

# (resource, what it is busy with) -> seconds of a round.
Terms = Mapping[tuple[str, str], float]


def bound(seconds: float, terms: Terms) -> tuple[str, float]:
    """Return what bounds a round, as `resource (its largest use)`, and the share of the round that this
    resource is busy; `waiting` where none is busy for half of it.

    Args:
        seconds: of the round.
    """
    busy: dict[str, float] = {}
    for (resource, _), value in terms.items():
        busy[resource] = busy.get(resource, 0.0) + value
    resource = max(busy, key=lambda name: busy[name])
    share = busy[resource] / seconds
    if share < FEW:
        return "waiting", share
    uses = {use: value for (name, use), value in terms.items() if name == resource}
    return f"{resource} ({max(uses, key=lambda use: uses[use])})", share


def measured_terms(
    clients: int, training: float, exchange: float, streams: float, *, cores: int, link: float
) -> Terms:
    """Return the terms of a round whose clients share the cores of one machine.

    Args:
        training, exchange: CPU-seconds of a client and round, in its main thread and in all others.
        streams: those of `exchange` that grow with the update: key streams, seals, sums.
        link: seconds that the busiest link needs for what its clients send.
    """
    return {
        ("cores", "training"): clients * training / cores,
        ("cores", "key streams"): clients * min(streams, exchange) / cores,
        ("cores", "messages"): clients * max(0.0, exchange - streams) / cores,
        ("link", "update"): link,
    }


def simulated_terms(train: float, link: float, streams: float, members: float) -> Terms:
    """Return the terms of a round of clients that have a server each."""
    return {
        ("device", "training"): train,
        ("link", "update"): link,
        ("cores", "key streams"): streams,
        ("cores", "messages"): members,
    }


def fitted_member_s(points: list[tuple[int, float]], message_s: float) -> float:
    """Return the CPU-seconds for each other participant, by least squares through the origin.

    Args:
        points: (clients, CPU-seconds of a client's exchange without what grows with the update).
        message_s: CPU-seconds for each other participant that are counted already.
    """
    return sum(n * cpu for n, cpu in points) / sum(n * n for n, _ in points) - message_s

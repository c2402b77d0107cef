"""How long each rank sleeps, from the simulated step of its host's cards. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

UPDATES = ("optimizer", "client's ranks")


@dataclass(frozen=True)
class Seconds:
    """Seconds of the parts of a local step; in split learning, of one micro-batch, but for the optimizer's.

    Attributes:
        gradients: all of a step but its update; in split learning, going back through what a side has.
        optimizer: summing gradients over a client's ranks, and the update.
        forward, head: in split learning only.
    """

    gradients: float
    optimizer: float = 0.0
    forward: float = 0.0
    head: float = 0.0

    def scaled(self, factor: float) -> "Seconds":
        """Return all seconds times a factor."""
        return Seconds(**{name: factor * seconds for name, seconds in asdict(self).items()})


def of_step(causes: Mapping[str, float]) -> Seconds:
    """Return the sleeps of a client's local step."""
    update = sum(causes.get(cause, 0.0) for cause in UPDATES)
    return Seconds(sum(causes.values()) - update, update)


def of_ends(causes: Mapping[str, float], accumulation: int) -> Seconds:
    """Return the sleeps of a client in split learning; both sides' updates are the client's."""
    return Seconds(
        causes["gradients"] / accumulation,
        causes["optimizer"],
        forward=causes["forward"] / accumulation,
        head=causes["head"] / accumulation,
    )


def of_body(causes: Mapping[str, float], accumulation: int) -> Seconds:
    """Return the sleeps of the server in split learning."""
    return Seconds(
        causes["server's gradients"] / accumulation, forward=causes["server's forward"] / accumulation
    )

"""One client's turn in a round: its task, its result, and the interface of the trainer that carries it out,
as methods see them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from fedspeed.data.batches import StepBatches
from fedspeed.federation.arrays import Arrays

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine, Sums

ALONE = 0  # the round number of a turn that a client takes without the others


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One client's task in one round.

    Attributes:
        start: all fp32 arrays by name that the client starts from.
        frozen: names of arrays that the client does not train in this turn. `Method.frozen` has those that no
            client of the round trains.
        steps: optimizer steps to take.
        seed: of the method's random draws in this turn; the same on all ranks of the client. The trainer
            seeds dropout, which differs between ranks.
        memory: arrays that the client has kept from its last usable turn, empty before the first. They are
            journalled on the client's own host and never sent.
        exchange: number of the exchange that the turn belongs to, from 0 in each round. Always 0 unless
            `Method.exchange_every` is "step".
    """

    client: int
    round: int
    start: Arrays
    frozen: frozenset[str]
    steps: int
    seed: int
    memory: Arrays
    exchange: int = 0

    def starting_at(self, start: Arrays) -> "Turn":
        """Return the same turn with another start state."""
        return replace(self, start=start)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a turn.

    Attributes:
        end: the client's arrays after training. sums: of losses, tokens and steps taken.
        memory: arrays that the client keeps for its next turn.
    """

    end: Arrays
    sums: "Sums"
    memory: Arrays


@dataclass(frozen=True)
class TurnSize:
    """The size of every client's turn in a round, where all take equally many steps.

    Attributes:
        steps: local steps. micro_batches: of a step. rows: the most of a micro-batch on one rank. tokens: the
            most of a row.
    """

    steps: int
    micro_batches: int
    rows: int
    tokens: int


Between = Callable[[int, Turn], None]  # called with (client slot, turn)
Step = Callable[[Sequence[Turn], int], "list[Sums]"]  # (turns, number of the step, from 0) -> sums by turn


class TurnTrainer(Protocol):
    """What a method may use of the trainer (`federation.trainer.Trainer`) to train turns."""

    @property
    def turn_size(self) -> TurnSize:
        """Return the size of every client's turn in a round, for a server that answers clients."""
        ...

    def begin(self, engine: "ClientEngine", turns: Sequence[Turn]) -> None:
        """Load turns into the engine's first client slots, and seed this rank's dropout."""
        ...

    def local_steps(
        self,
        engine: "ClientEngine",
        turns: Sequence[Turn],
        *,
        between: Between | None = None,
        step: Step | None = None,
    ) -> list[Trained]:
        """Train turns by gradient steps, each on its own rows, or by steps of the method's own.

        Args:
            between: called with (client slot, turn) between the gradients and the optimizer step.
            step: called with (turns that go on, number of the step) in place of a gradient step; returns
                their sums.
        """
        ...

    def shown_progress(self, turns: Sequence[Turn]) -> AbstractContextManager[object]:
        """Return the context in which the local steps of turns are shown as progress (`stepped`)."""
        ...

    def rows(self, turn: Turn, number: int) -> StepBatches:
        """Return this rank's batches of a turn's local step `number`, from 0."""
        ...

    def stepped(self, turns: Sequence[Turn], number: int, done: "Sequence[Sums]") -> None:
        """Report a finished local step to the progress display and the monitor."""
        ...

    def ask(self, arrays: Arrays) -> Arrays:
        """Send arrays to the method's server, and return its answer."""
        ...

    def tell(self, arrays: Arrays) -> None:
        """Send arrays to the method's server, which does not answer."""
        ...

    def lr(self, turn: Turn, number: int) -> float:
        """Return the learning rate of a turn's local step `number`, from 0."""
        ...

    def round_lr(self, round: int, exchange: int = 0) -> float:
        """Return the learning rate of a round's first local step before an exchange; in a round of one
        exchange, that of local step `exchange`, from 0.
        """
        ...

    def public_batches(self, step: int) -> StepBatches:
        """Return this rank's batches of public rows for a step of the method's server."""
        ...

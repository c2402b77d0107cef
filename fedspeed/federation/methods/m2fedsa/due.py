"""The order of the messages of a client's turn, by which the server knows which one is due."""

from collections.abc import Collection

from fedspeed.engine.split.messages import HIDDEN, LAST, LENGTHS, OUTPUT_GRADIENT
from fedspeed.errors import FedSpeedError
from fedspeed.federation.methods.turns import TurnSize

END = "end"  # the array of the message with which a client's turn, or a participant's evaluation, ends


def due(number: int, size: TurnSize) -> frozenset[str]:
    """Return the names of the arrays in a turn's message: for each micro-batch hidden states, then the
    gradient of what came back, with a mark where a local step ends; after the last step the end.

    Args:
        number: of the message in the turn, from 0.
    """
    micro_batch, is_gradient = divmod(number, 2)
    if micro_batch >= size.steps * size.micro_batches:
        return frozenset({END})
    if not is_gradient:
        return frozenset({HIDDEN, LENGTHS})
    ends_step = (micro_batch + 1) % size.micro_batches == 0
    return frozenset({OUTPUT_GRADIENT, LAST} if ends_step else {OUTPUT_GRADIENT})


def check_due(names: Collection[str], number: int, size: TurnSize) -> None:
    """Check that a turn's message has the arrays that are due.

    Args:
        names: of its arrays. number, size: see `due`.

    Raises:
        FedSpeedError: it has not, so that the turn is shorter or longer than the run's, or is not the same.
    """
    expected = due(number, size)
    if set(names) != expected:
        raise FedSpeedError(
            f"message {number + 1} of a turn of {size.steps} local steps (train.local_steps) of "
            f"{size.micro_batches} micro-batches (train.accumulation) should have "
            f"{', '.join(sorted(expected))}, and has {str(sorted(names))[:200]}; all must run the same "
            "version of FedSpeed, and go through the same steps"
        )

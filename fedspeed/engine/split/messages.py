"""The names of arrays in messages between the parts of a split model, and what a message may have. Without
torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.errors import FedSpeedError

Message = dict[str, np.ndarray]
# Names of arrays in messages. Up: hidden states with the lengths of their rows, then the gradient of what
# came back; with LAST, it is that of a step's last micro-batch. Down: hidden states, and the gradient of
# HIDDEN.
HIDDEN = "hidden"
LENGTHS = "lengths"
OUTPUT = "output"
OUTPUT_GRADIENT = "output_gradient"
HIDDEN_GRADIENT = "hidden_gradient"
LAST = "last"
MARK = np.zeros(0, np.uint8)  # the content of an array whose name says all


class NotFiniteError(FedSpeedError):
    """Values of a message, or of the answer to it, are not finite. Whoever has sent it waits for an answer of
    its shape.
    """


@dataclass(frozen=True)
class Limits:
    """The most that a message of hidden states may have.

    Attributes:
        rows: of a micro-batch, on all ranks of a client together. tokens: of a row.
    """

    rows: int
    tokens: int


def answer_of_zeros(message: Mapping[str, np.ndarray]) -> Message:
    """Return an answer of the right name and shape that has no meaning, to a message with hidden states or
    the gradient of what came back.
    """
    if HIDDEN in message:
        return {OUTPUT: np.zeros_like(message[HIDDEN])}
    return {HIDDEN_GRADIENT: np.zeros_like(message[OUTPUT_GRADIENT])}


def check_names(message: Mapping[str, np.ndarray], *expected: Sequence[str]) -> None:
    """Check that a received message has one of the expected sets of names, and no others.

    Raises:
        FedSpeedError: it has not.
    """
    if sorted(message) not in [sorted(names) for names in expected]:
        listed = " or ".join(", ".join(names) for names in expected)
        raise FedSpeedError(
            f"a message should have {listed}, and has {str(sorted(message))[:200]}; all must run the same "
            "version of FedSpeed, and go through the same steps"
        )

"""What the server of a method does to the state, told to all ranks."""

from typing import TYPE_CHECKING

import numpy as np

from fedspeed import activity
from fedspeed.errors import FedSpeedError
from fedspeed.federation.arrays import Arrays, are_finite
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import Method

if TYPE_CHECKING:  # it imports what calls this
    from fedspeed.federation.parts import RankParts

SIGNATURE = 64  # bytes, of Ed25519


def server_stepped(parts: "RankParts", state: Arrays, *, round: int, exchange: int = 0) -> Arrays:
    """Return the state after the step of the method's server, which tells it to all, signed. Collective.

    Args:
        state: the same on all ranks. round: 0 before the first. exchange: of the round, from 0.

    Raises:
        FedSpeedError: no rank is the server; its result is not finite, or it has not told the same to all.
        LostPeerError: the server, or another participant, is missing.
    """
    if type(parts.method).server_step is Method.server_step:
        return state
    layout = Layout.of(state)
    about = f"the server's step in round {round}, exchange {exchange}"
    vector = np.zeros(layout.size, dtype=np.float32)
    signature = np.zeros(SIGNATURE, dtype=np.uint8)
    if parts.role.server:
        with activity.during(about):
            made = parts.method.server_step(
                state,
                parts.engine,
                parts.role.public_rows,
                round=round,
                exchange=exchange,
                trainer=parts.trainer,
            )
        vector = layout.flatten(made)
        if parts.witness is not None:
            signature = parts.witness.sign(about, vector)
    priority = float(parts.role.server)
    with activity.during(f"the wait for {about}"):
        told = parts.link.share(vector, priority)
    if told is None:
        raise FedSpeedError(
            f"federation.method={parts.config.federation.method.name} has a server, and no rank is one; "
            "write `# fed-host NAME role=server` in the hostfile"
        )
    _check(parts, about, told, parts.link.share(signature, priority))
    stepped = layout.unflatten(told)
    if not are_finite(stepped):
        raise FedSpeedError(
            f"{about}: its result is not finite; look at federation.public_rows, or lower train.lr"
        )
    return stepped


def _check(parts: "RankParts", about: str, told: np.ndarray, signature: np.ndarray) -> None:
    """Hold what this rank has heard against what all have. Collective.

    Raises:
        FedSpeedError: the server has not told, and signed, the same to all; on all ranks alike.
    """
    problem = ""
    if parts.witness is not None:
        problem = parts.witness.problem(about, told, signature)
    if parts.link.any_of_client(bool(problem)):
        elsewhere = f"{about}: this rank's gateway has heard what others have not; its message says more"
        raise FedSpeedError(problem or elsewhere)

"""The step of a method's server: it computes a new state and broadcasts it to all ranks, signed."""

from typing import TYPE_CHECKING

import numpy as np

from fedspeed import activity
from fedspeed.errors import FedSpeedError
from fedspeed.federation.arrays import Arrays, are_finite
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import Method
from fedspeed.federation.methods.config import METHODS
from fedspeed.text_safety import quoted

if TYPE_CHECKING:  # `rank_components` imports, by way of the trainer, modules that import this one
    from fedspeed.federation.rank_components import RankComponents

SIGNATURE_BYTES = 64  # Ed25519
PROBLEM_BYTES = 1024  # of the text of what the server has against a round


def server_stepped(components: "RankComponents", state: Arrays, *, round: int, exchange: int = 0) -> Arrays:
    """Return the state after the step of the method's server, on all ranks; `state` itself if the method has
    no such step. Collective over all ranks.

    Args:
        state: the same on all ranks. round: 0 before the first. exchange: of the round, from 0.

    Raises:
        FedSpeedError: no rank is the server, it refuses what it has served, its result is not finite, or it
            has sent different results.
        LostPeerError: the server, or another participant, is missing.
    """
    if type(components.method).server_step is Method.server_step:
        return state
    layout = Layout.of(state)
    step_name = f"the server's step in round {round}, exchange {exchange}"
    vector = np.full(layout.size, np.nan, dtype=np.float32)
    problem = components.method.served_problem() if components.role.server else ""
    signature = np.zeros(SIGNATURE_BYTES, dtype=np.uint8)
    if components.role.server:
        if not problem:
            with activity.during(step_name):
                new_state = components.method.server_step(
                    state,
                    components.engine,
                    components.role.public_rows,
                    round=round,
                    exchange=exchange,
                    trainer=components.trainer,
                )
            vector = layout.flatten(new_state)
        if components.witness is not None:
            signature = components.witness.sign(step_name, vector)
    priority = float(components.role.server)
    with activity.during(f"the wait for {step_name}"):
        received = components.link.share(vector, priority)
    if received is None:
        raise FedSpeedError(
            f"federation.method={components.config.federation.method.name} has a server, and no rank is one; "
            "write `# fed-host NAME role=server` in the hostfile"
        )
    received_signature = components.link.share(signature, priority)
    assert received_signature is not None, "the server that sent a vector with this priority signs it"
    _check(components, step_name, received, received_signature)
    stepped = layout.unflatten(received)
    if not are_finite(stepped):
        problem = _problem_on_all(components, problem)
        if problem:
            raise FedSpeedError(f"{step_name} does not take place: {problem}")
        reads_rows = METHODS[components.config.federation.method.name].public_rows
        remedy = "look at federation.public_rows, or lower train.lr" if reads_rows else "lower train.lr"
        raise FedSpeedError(f"{step_name}: its result is not finite; {remedy}")
    return stepped


def _problem_on_all(components: "RankComponents", problem: str) -> str:
    """Return the server's problem on all ranks; what is too long of it is cut off. Collective over all
    ranks.
    """
    data = np.zeros(PROBLEM_BYTES, np.uint8)
    encoded = problem.encode()[:PROBLEM_BYTES]
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    shared = components.link.share(data, float(components.role.server))
    assert shared is not None, "the server has sent its result before"
    text = shared.tobytes().rstrip(b"\0").decode(errors="replace")
    return problem or quoted(text, PROBLEM_BYTES)


def _check(components: "RankComponents", step_name: str, received: np.ndarray, signature: np.ndarray) -> None:
    """Check that all participants received the same result with a valid signature. Collective over all ranks.

    Raises:
        FedSpeedError: they did not; on all ranks alike.
    """
    problem = ""
    if components.witness is not None:
        problem = components.witness.problem(step_name, received, signature)
    if components.link.any_of_client(bool(problem)):
        elsewhere = f"{step_name}: this rank's gateway has heard what others have not; its message says more"
        raise FedSpeedError(problem or elsewhere)

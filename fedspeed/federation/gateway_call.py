"""A call that only the gateway of a client makes, with its result on all ranks of the client."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fedspeed.errors import LostPeerError, connection_text

if TYPE_CHECKING:  # torch is not imported by modules that only pass an engine on
    from fedspeed.engine.client_engine import ClientEngine


def gateway_result(engine: "ClientEngine", call: Callable[[], bytes] | None, failed: str) -> bytes:
    """Return what a call on the gateway returns, on all ranks of the client. If it fails, all ranks raise.
    Collective over the client.

    Args:
        call: of the gateway; None on the client's other ranks.
        failed: what the other ranks raise a LostPeerError with.
    """
    failure = None
    result = b""
    if call is not None:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - the other ranks are informed, then it is raised
            failure = error
    length = len(result) if failure is None else -1
    try:
        length = int(engine.share_from_gateway(np.array([length], dtype=np.int64))[0])
        if failure is not None:
            raise failure
        if length < 0:
            raise LostPeerError(f"{failed}; its message says more")
        if length == 0:
            return b""
        buffer = result if call is not None else bytes(length)
        return engine.share_from_gateway(np.frombuffer(bytearray(buffer), np.uint8)).tobytes()
    except RuntimeError as error:  # the only type that torch raises for a lost connection
        raise LostPeerError(f"the gateway of this rank was lost: {connection_text(error)}") from error

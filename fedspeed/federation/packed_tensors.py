"""Tensors as one message, and a digest by which the receiver tells whether they are the right ones.

The message has a text that names the folded arrays, whose shapes grow from round to round, and the values of
all arrays as float32. All participants know the names and shapes of the other arrays.
"""

import hashlib
import json

import numpy as np

from fedspeed.errors import JournalError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.folded_layout import MAX_TEXT, folded_text, layout_of_text, product_values
from fedspeed.federation.layout import Layout
from fedspeed.routing.state_claim import TensorsDigest


def tensors_digest(arrays: Arrays) -> TensorsDigest:
    """Return the digest of arrays, and the size of their message."""
    layout = Layout.of(arrays)
    state = hashlib.sha256(_header(layout))
    for name in layout.names:
        state.update(np.ascontiguousarray(arrays[name], dtype=np.float32).reshape(-1).view(np.uint8).data)
    return TensorsDigest(folded_text(layout).size, layout.size, state.digest())


def to_message(arrays: Arrays) -> np.ndarray:
    """Return arrays as one message: [`TensorsDigest.message_bytes`] uint8."""
    layout = Layout.of(arrays)
    return np.concatenate([folded_text(layout), layout.flatten(arrays).view(np.uint8)])


def from_message(message: bytes | np.ndarray, expected: TensorsDigest, known: Layout) -> Arrays | None:
    """Return the arrays of a message; None if they are not the expected ones.

    Args:
        message: of `expected.message_bytes` bytes. known: a layout of this run, with any folded arrays.
    """
    data = np.frombuffer(message, dtype=np.uint8)
    text = data[: expected.text_bytes]
    values = data[expected.text_bytes :].copy().view(np.float32)
    try:
        layout = layout_of_text(text.tobytes(), known)
    except JournalError:
        return None
    if layout.size != values.size or values.size != expected.values:
        return None
    arrays = layout.unflatten(values)
    return arrays if tensors_digest(arrays) == expected else None


def check_size(expected: TensorsDigest, known: Layout) -> None:
    """Check that tensors of this run can be as large as a digest says, before memory is taken for them.

    Args:
        known: a layout of this run, with any folded arrays.

    Raises:
        JournalError: they cannot.
    """
    most = known.size + product_values(known)
    if not 0 < expected.text_bytes <= MAX_TEXT or not 0 <= expected.values <= most:
        raise JournalError(
            f"the state to go on from has {expected.values} values and a text of {expected.text_bytes} "
            f"bytes, where this model has at most {most} and {MAX_TEXT}; start anew with --fresh on all sites"
        )


def _header(layout: Layout) -> bytes:
    """Return names and shapes of a layout, preceded by their length."""
    text = json.dumps([layout.names, layout.shapes]).encode()
    return len(text).to_bytes(8, "big") + text

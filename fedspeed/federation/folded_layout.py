"""Layouts of states with a folded adapter, whose arrays grow from round to round: which are valid, and how
all ranks learn the layout of a state that one participant sends.

When a run resumes, the participant with the newest state sends it to all as one vector. Without folded
arrays, all know its layout. With them, that participant first sends the names and shapes of the folded
arrays.
"""

import json
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from fedspeed.errors import JournalError
from fedspeed.federation.layout import Layout
from fedspeed.federation.link import ClientLink
from fedspeed.files import foreign_json
from fedspeed.models.factors import pairs
from fedspeed.models.folded import LEFT, PREFIX, RIGHT, WHOLE, is_folded, module_of
from fedspeed.text_safety import quoted

Shape = tuple[int, ...]
MAX_TEXT = 1 << 20  # bytes of the text that names folded arrays


def is_of_folded(name: str) -> bool:
    """Return whether an array is folded, by its name in a state or in a journal (`global/NAME`)."""
    return is_folded(name.rpartition("/")[2])


def without_folded(layout: Layout) -> Layout:
    """Return a layout without its folded arrays."""
    return layout.without(filter(is_of_folded, layout.names))


def fits(layout: Layout, known: Layout) -> bool:
    """Return whether two layouts are of states of the same run: they are equal without folded arrays."""
    return without_folded(layout) == without_folded(known)


def shared_layout(link: ClientLink, known: Layout, offered: Layout | None, priority: float) -> Layout:
    """Return the layout of the state of the participant with the highest priority. Collective over all ranks,
    which then call `link.share` with the state itself and the same priority.

    Args:
        known: a layout of this run, with any folded arrays. offered: that of this rank's state, if it has
            one.

    Raises:
        JournalError: the folded arrays that were received do not fit this model; on all ranks alike.
        LostPeerError: a participant is missing.
    """
    text = folded_text(offered or known)
    received_length = link.share(np.array([float(len(text))]), priority)
    if received_length is None:
        return without_folded(known)
    length = _valid_length(float(received_length[0]))
    received = link.share(text if len(text) == length else np.zeros(length, np.uint8), priority)
    assert received is not None, "the participant that has sent a length sends the text"
    return layout_of_text(received.astype(np.uint8).tobytes(), known)


def folded_text(layout: Layout) -> np.ndarray:
    """Return names and shapes of a layout's folded arrays as JSON: [bytes] uint8."""
    folded = [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes) if is_of_folded(name)]
    return np.frombuffer(json.dumps(folded).encode(), dtype=np.uint8)


def _valid_length(received: float) -> int:
    """Return a received length in bytes. Raises JournalError if it is none, or above MAX_TEXT."""
    if not (0 < received <= MAX_TEXT and received.is_integer()):
        raise _refusal(f"the description of its folded arrays has {received:g} bytes, of at most {MAX_TEXT}")
    return int(received)


def layout_of_text(text: bytes, known: Layout) -> Layout:
    """Return a layout of the unfolded arrays of a known one, and of the folded arrays that a text names.

    Raises:
        JournalError: they do not fit this model.
    """
    unfolded = without_folded(known)
    try:
        folded = {name: _matrix_shape(name, shape) for name, shape in _list(foreign_json(text, MAX_TEXT))}
    except (ValueError, TypeError) as error:
        raise _refusal(f"the description of its folded arrays cannot be read ({quoted(error)})") from error
    _check(folded, known)
    shapes = dict(zip(unfolded.names, unfolded.shapes)) | folded
    names = tuple(sorted(shapes))
    return Layout(names, tuple(shapes[name] for name in names))


def _list(value: object) -> list:
    """Return a received value. Raises ValueError if it is no list."""
    if not isinstance(value, list):
        raise ValueError("it is no list")
    return value


def _matrix_shape(name: object, shape: object) -> Shape:
    """Return a received shape. Raises ValueError if it is not that of a matrix, or the name is no string."""
    if not isinstance(name, str) or not isinstance(shape, list) or [type(n) for n in shape] != [int, int]:
        raise ValueError("it is no list of names and shapes of matrices")
    return shape[0], shape[1]


def _product_shapes(known: Layout) -> dict[str, Shape]:
    """Return the shapes [out, in] of the products of LoRA's factors and of folded arrays, by module, such as
    `global/x.q`.
    """
    shapes = dict(zip(known.names, known.shapes))
    trained = {module_of(a): (shapes[b][0], shapes[a][1]) for a, b in pairs(without_folded(known).names)}
    return {module: _folded_product(arrays) for module, arrays in _folded_arrays(shapes).items()} | trained


def _folded_product(arrays: Mapping[str, Shape]) -> Shape:
    """Return the shape [out, in] of the product of a module's folded arrays."""
    return arrays[WHOLE] if WHOLE in arrays else (arrays[LEFT][0], arrays[RIGHT][1])


def _folded_arrays(shapes: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Return the shapes of folded arrays by module, such as `global/x.q`, and kind."""
    by_module: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        group, slash, array = name.rpartition("/")
        if is_folded(array):
            module, _, kind = array.removeprefix(PREFIX).rpartition(".")
            by_module[f"{group}{slash}{module}"][kind] = shape
    return by_module


def product_values(known: Layout) -> int:
    """Return how many values folded arrays can have at most: those of all products."""
    return sum(out * width for out, width in _product_shapes(known).values())


def _check(folded: dict[str, Shape], known: Layout) -> None:
    """Refuse folded arrays that no method makes. A module may have either factors [out, R] and [R, in] that
    are together smaller than their product, or the product itself, or those that a known state has.

    Args:
        folded: shapes of the folded arrays, as received. known: a layout of this run.

    Raises:
        JournalError: an array is of no such module, or a module's arrays do not fit together.
    """
    for name in folded:
        if not is_of_folded(name):
            raise _refusal(f"it has {name[:200]!r}, which no method folds")
    products = _product_shapes(known)
    as_known = _folded_arrays(dict(zip(known.names, known.shapes)))
    for module, shapes in _folded_arrays(folded).items():
        if module not in products:
            raise _refusal(f"it has folded arrays of {module[:200]!r}, which no method folds")
        d_out, d_in = products[module]
        if shapes in ({WHOLE: (d_out, d_in)}, as_known.get(module)):
            continue
        folded_rank = shapes.get(LEFT, (0, 0))[1]
        is_smaller = 0 < folded_rank and folded_rank * (d_out + d_in) < d_out * d_in
        if not is_smaller or shapes != {LEFT: (d_out, folded_rank), RIGHT: (folded_rank, d_in)}:
            raise _refusal(
                f"the folded arrays of {module} are {str(shapes)[:200]}, which does not fit its product "
                f"[{d_out}, {d_in}]"
            )


def _refusal(reason: str) -> JournalError:
    """Return the error for a state that this run cannot continue from."""
    return JournalError(
        f"the state to go on from, as received from the participant with the newest round: {reason}; start "
        "anew with --fresh, or without that participant's journal"
    )

"""Layouts of states with a folded adapter, whose arrays grow from round to round: what fits, and how all
ranks learn it.

A state that is offered by one participant for all to go on from is one vector. Where nothing is folded,
everybody knows its layout. Where a method folds, the participant that offers it tells which folded arrays are
in it, and of which shapes.
"""

import json
from collections import defaultdict

import numpy as np

from fedspeed.errors import JournalError
from fedspeed.federation.layout import Layout
from fedspeed.models.factors import pairs
from fedspeed.models.folded import LEFT, PREFIX, RIGHT, WHOLE, is_folded, module_of

Shape = tuple[int, ...]
MAX_TEXT = 1 << 20  # bytes of what is told of folded arrays


def is_of_folded(name: str) -> bool:
    """Say whether an array is folded, by its name in a state or in a journal's `global/NAME`."""
    return is_folded(name.rpartition("/")[2])


def without_folded(layout: Layout) -> Layout:
    """Return the layout of what is not folded."""
    return layout.without(filter(is_of_folded, layout.names))


def fits(found: Layout, known: Layout) -> bool:
    """Say whether two layouts are of states of the same run: equal but for what is folded."""
    return without_folded(found) == without_folded(known)


def shared_layout(link, known: Layout, offered: Layout | None, priority: float) -> Layout:
    """Return the layout of the state that the participant with the highest priority offers. Collective over
    all ranks, which go on with `link.share` of the state itself at the same priority.

    Args:
        known: a layout of this run, whatever is folded in it. offered: this rank's, if it has one to offer.

    Raises:
        JournalError: what was told is no list of folded arrays that fit this model's; on all ranks alike.
    """
    own = _written(offered or known)
    told = link.share(np.array([float(len(own))]), priority)
    if told is None:
        return without_folded(known)
    length = _length(float(told[0]))
    text = link.share(own if len(own) == length else np.zeros(length, np.uint8), priority)
    return _read(text.astype(np.uint8).tobytes(), without_folded(known))


def _written(layout: Layout) -> np.ndarray:
    """Return names and shapes of the folded arrays of a layout as text: [bytes] uint8."""
    found = [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes) if is_of_folded(name)]
    return np.frombuffer(json.dumps(found).encode(), dtype=np.uint8)


def _length(told: float) -> int:
    """Return how many bytes of text follow, of what was told. Raises JournalError: no text has so many."""
    if not (0 < told <= MAX_TEXT and told.is_integer()):
        raise _refusal(f"{told:g} bytes are to tell what is folded, of at most {MAX_TEXT}")
    return int(told)


def _read(text: bytes, rest: Layout) -> Layout:
    """Return the layout of what is not folded together with the folded arrays that a text names."""
    try:
        found = {name: _matrix(name, shape) for name, shape in json.loads(text)}
    except (ValueError, TypeError, RecursionError) as error:
        raise _refusal(f"what is folded cannot be read ({error})") from error
    _check(found, _products(rest))
    shapes = dict(zip(rest.names, rest.shapes)) | found
    names = tuple(sorted(shapes))
    return Layout(names, tuple(shapes[name] for name in names))


def _matrix(name: object, shape: object) -> Shape:
    """Return what was told as the shape of a matrix. Raises ValueError: it is none, or nothing's name."""
    if not isinstance(name, str) or not isinstance(shape, list) or [type(n) for n in shape] != [int, int]:
        raise ValueError("it is no list of names and shapes of matrices")
    return shape[0], shape[1]


def _products(rest: Layout) -> dict[str, Shape]:
    """Return the shapes [out, in] of the products of a layout's factors, by module, such as `global/x.q`."""
    shapes = dict(zip(rest.names, rest.shapes))
    return {module_of(a): (shapes[b][0], shapes[a][1]) for a, b in pairs(rest.names)}


def _check(found: dict[str, Shape], products: dict[str, Shape]) -> None:
    """Refuse arrays of which no method folds all beside one of the modules: neither factors [out, R] and [R,
    in] that are smaller than their product, nor the product.

    Args:
        found: shapes of the folded arrays, as told. products: by module, [out, in].
    """
    folded: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in found.items():
        group, slash, own = name.rpartition("/")
        module, _, kind = own.removeprefix(PREFIX).rpartition(".")
        if not is_folded(own) or f"{group}{slash}{module}" not in products:
            raise _refusal(f"it has {name[:200]!r}, which no method folds")
        folded[f"{group}{slash}{module}"][kind] = shape
    for module, parts in folded.items():
        out, wide = products[module]
        if parts == {WHOLE: (out, wide)}:
            continue
        rank = parts.get(LEFT, (0, 0))[1]
        is_smaller = 0 < rank and rank * (out + wide) < out * wide
        if not is_smaller or parts != {LEFT: (out, rank), RIGHT: (rank, wide)}:
            raise _refusal(
                f"what is folded beside {module} is {str(parts)[:200]}, which does not fit its product "
                f"[{out}, {wide}]"
            )


def _refusal(what: str) -> JournalError:
    """Return the error of a state that cannot be taken over."""
    return JournalError(
        f"the state to go on from, as the participant with the newest round tells it: {what}; start anew "
        "with --fresh, or without that participant's journal"
    )

"""Layouts of states with a folded adapter, whose arrays grow from round to round: what fits, and how all
ranks learn it.

A state that is offered by one participant for all to go on from is one vector. Where nothing is folded,
everybody knows its layout. Where a method folds, the participant that offers it tells which folded arrays are
in it, and of which shapes.
"""

import json

import numpy as np

from fedspeed.errors import JournalError
from fedspeed.federation.layout import Layout
from fedspeed.models.folded import LEFT, RIGHT, WHOLE, is_folded

KINDS = (LEFT, RIGHT, WHOLE)


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
        JournalError: what was told is no list of folded arrays.
    """
    own = _written(offered or known)
    size = link.share(np.array([float(len(own))]), priority)
    if size is None:
        return without_folded(known)
    text = link.share(own if len(own) == size[0] else np.zeros(int(size[0]), np.uint8), priority)
    return _read(text.astype(np.uint8).tobytes(), without_folded(known))


def _written(layout: Layout) -> np.ndarray:
    """Return names and shapes of the folded arrays of a layout as text: [bytes] uint8."""
    found = [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes) if is_of_folded(name)]
    return np.frombuffer(json.dumps(found).encode(), dtype=np.uint8)


def _read(text: bytes, rest: Layout) -> Layout:
    """Return the layout of what is not folded together with the folded arrays that a text names."""
    try:
        found = {name: tuple(shape) for name, shape in json.loads(text)}
    except (ValueError, TypeError) as error:
        raise JournalError(
            f"what was told of the state to go on from cannot be read ({error}); start anew with --fresh"
        ) from error
    modules = {name.partition(".lora_")[0].rpartition("/")[2] for name in rest.names}
    for name, shape in found.items():
        _check(name, shape, modules)
    shapes = dict(zip(rest.names, rest.shapes)) | found
    names = tuple(sorted(shapes))
    return Layout(names, tuple(shapes[name] for name in names))


def _check(name: object, shape: tuple, modules: set[str]) -> None:
    """Refuse an array that is not folded beside one of the modules, or whose shape is no matrix's."""
    module, _, kind = str(name).rpartition("/")[2].partition(":")[2].rpartition(".")
    sizes = [isinstance(n, int) and 0 < n < 2**31 for n in shape]
    if not is_of_folded(str(name)) or kind not in KINDS or module not in modules or sizes != [True, True]:
        raise JournalError(
            f"the state to go on from has {name!r} of shape {shape}, which no method folds; start anew "
            "with --fresh"
        )

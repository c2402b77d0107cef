"""What a mistyped key was probably meant to be."""

import difflib
from collections.abc import Iterable


def remedy_for_unknown(key: str, known: Iterable[str]) -> str:
    """The remedy for an unknown dotted `key`: the likeliest of the known ones, or a list of what exists beside it."""
    known = list(known)
    parent, _, name = key.rpartition(".")
    siblings = {_name(k): k for k in known if k.rpartition(".")[0] == parent}
    near_siblings = [siblings[n] for n in difflib.get_close_matches(name, siblings, n=1, cutoff=0.65)]
    same_name_elsewhere = [k for k in known if _name(k) == name]
    near_elsewhere = difflib.get_close_matches(name, [_name(k) for k in known], n=1, cutoff=0.75)
    likely = near_siblings or same_name_elsewhere or [k for k in known if _name(k) in near_elsewhere]
    if likely:
        return f"did you mean {' or '.join(likely)}?"
    return f"known there: {', '.join(sorted(siblings.values() or known))}"


def _name(key: str) -> str:
    return key.rpartition(".")[2]

"""What a coalition knows after attempts that it has taken part in, and how close that is to one update.

It is computed from the coalition's own members: the masked sums that they store as owners and backups, the
secrets of self masks that have reached them, the sums that were opened to them, and without masks the cells
of their chunks. Differences of what they know from two attempts count too. The true updates are for scoring.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.masks import remove_self_masks
from fedspeed.routing.anonymous.phases import AgreedSum
from fedspeed.routing.audit.liars import Colluder
from fedspeed.routing.audit.rehearsal import Attempt

_READ = 0.5  # of the error of the sum


@dataclass(frozen=True)
class Closest:
    """The closest that a coalition has come to the update of an honest member.

    Attributes:
        error: norm of the difference between the update and the best multiple of what the coalition knows,
            divided by the norm of the update; 1 if it knows nothing.
        correlation: of the two, 0 if it knows nothing.
        share: of the update's values that it knows something about.
        beyond_sum: whether something that it knows is closer to an update than the sum of all honest ones, by
            more than a factor of two in the same values.
    """

    error: float = 1.0
    correlation: float = 0.0
    share: float = 0.0
    beyond_sum: bool = False


def learned(attempts: Sequence[Attempt]) -> list[np.ndarray]:
    """Return what the coalition knows of honest updates after attempts at sums of the same updates: vectors
    [length] float64 of sums, NaN where it knows nothing.
    """
    sums = [known for attempt in attempts if (known := _honest_sum(attempt)) is not None]
    differences = [a - b for a, b in combinations(sums, 2)]
    return [*sums, *differences, *(cell for attempt in attempts for cell in _cells(attempt))]


def closest(known: Iterable[np.ndarray], updates: Sequence[np.ndarray]) -> Closest:
    """Return the closest that any known vector comes to any honest update [length]."""
    total = np.stack(updates).sum(axis=0, dtype=np.float64)
    best = Closest()
    is_beyond = False
    for vector in known:
        mask = ~np.isnan(vector)
        for update in updates:
            true = update[mask].astype(np.float64)
            error = _error(vector[mask], true)
            is_beyond |= error < _READ * _error(total[mask], true)
            if error < best.error:
                correlation = float(vector[mask] @ true / np.linalg.norm(vector[mask]) / np.linalg.norm(true))
                best = Closest(error, correlation, float(mask.mean()))
    return replace(best, beyond_sum=is_beyond)


def _error(guess: np.ndarray, true: np.ndarray) -> float:
    """Return the relative error of the best multiple of a guess; 1 where one of the two is zero."""
    square = float(guess @ guess)
    norm = float(np.linalg.norm(true))
    if not square or not norm:
        return 1.0
    return float(np.linalg.norm(guess * (float(guess @ true) / square) - true)) / norm


def _honest_sum(attempt: Attempt) -> np.ndarray | None:
    """Return the sum of the honest members' integers, as far as the coalition can compute it: [length]
    float64 with NaN elsewhere; None if it can compute nothing.
    """
    members = attempt.coalition
    if not members or not all(hasattr(member, "integers") for member in members):
        return None  # it is not in the attempt, or that ended before any cell was made
    plan = members[0].plan
    own = np.zeros(plan.chunks * plan.chunk_length, np.uint32)
    for member in members:
        own[: len(member.integers)] += member.integers
    total = np.zeros_like(own)
    known = np.zeros(len(own), bool)
    for member in members:
        result = attempt.played.results[member.me]
        opened = result.values if isinstance(result, AgreedSum) else member._total
        if opened is not None:
            total[: len(opened)] = opened
            known[:] = True
    secrets: dict[int, bytes] = {}
    for member in members:
        secrets |= {member.me: member._self_secret, **member._self_secrets, **member.kept}
    if len(secrets) == members[0].n or not members[0].parameters.masked:
        for chunk, integers in _opened(members, secrets):
            start = chunk * plan.chunk_length
            total[start : start + plan.chunk_length] = integers
            known[start : start + plan.chunk_length] = True
    if not known.any():
        return None
    length = members[0].parameters.length
    return np.where(known, (total - own).view(np.int32).astype(np.float64), np.nan)[:length]


def _opened(members: Sequence[Colluder], secrets: dict[int, bytes]) -> Iterable[tuple[int, np.ndarray]]:
    """Yield chunks whose masked sums the coalition stores, and their opened sums [chunk_length] uint32."""
    for member in members:
        for chunk, masked in member.sums.items():
            integers = masked.copy()
            if member.parameters.masked:
                remove_self_masks(member.cipher, secrets, chunk, integers)
            yield chunk, integers


def _cells(attempt: Attempt) -> Iterable[np.ndarray]:
    """Yield the integers of honest members' cells that owners of the coalition see without masks: [length]
    float64 each, NaN outside of the cell.
    """
    for owner in attempt.coalition:
        if owner.parameters.masked or len(owner.received) <= owner.parameters.relays:
            continue
        serials = {sent.serial for member in attempt.coalition for sent in member.cells_sent}
        for chunk in owner.plan.owned(owner.me):
            cores = cells.empty_cells(owner.plan, owner.plan.relays + 1, owner.n)
            owner.open_layers(owner.plan.relays, chunk, cores)
            for core in cores:
                if cells.serial_of(core) not in serials:
                    yield _spread(owner, chunk, cells.integers_of(core))


def _spread(owner: Colluder, chunk: int, integers: np.ndarray) -> np.ndarray:
    """Return a chunk's integers at their places in a vector of all: [length] float64, NaN elsewhere."""
    width = owner.plan.chunk_length
    out = np.full(owner.plan.chunks * width, np.nan)
    out[chunk * width : (chunk + 1) * width] = integers.view(np.int32)
    return out[: owner.parameters.length]

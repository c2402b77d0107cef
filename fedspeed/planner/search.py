"""The fastest setting that fits, and why the others lost. Pure.

Every setting is weighed on every kind of rank; the slowest rank of the slowest cluster counts, since a round
ends with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fedspeed.cluster.topology import Topology
from fedspeed.planner.bisection import least
from fedspeed.planner.changes import refusal
from fedspeed.planner.fitting import families, fits, grown, lack, most_frugal, shortage, spare_bytes
from fedspeed.planner.hardware import GIB, Node
from fedspeed.planner.memory import kept_bytes, memory_of
from fedspeed.planner.places import places_of
from fedspeed.planner.plan import STREAMED, Alternative, ClusterPlan, Forecast, Place, Plan, Setting, Task
from fedspeed.planner.timing import arithmetic_of, seconds_of
from fedspeed.schedule.limits import QUANTISED

TINY_S = 1e-6  # times closer than this are equal


def plan(task: Task, topology: Topology, nodes: Mapping[str, Node], notes: Sequence[str] = ()) -> Plan:
    """The plan for a task on clients laid out on nodes.

    Args:
        nodes: by host name, at least those that work.

    Raises:
        PlanError: nothing fits; `changes` names what would.
    """
    places = places_of(topology, nodes)
    everywhere = [place for group in places.values() for place in group]
    best = fastest(task, everywhere)
    if best is None:
        raise refusal(task, places)
    clusters = []
    for name, group in places.items():
        own = best if len(places) == 1 else fastest(task, group)
        clusters.append(
            ClusterPlan(
                name, tuple(group), _forecast(task, best, name, group), own, _forecast(task, own, name, group)
            )
        )
    return Plan(
        task,
        topology,
        best,
        clusters=tuple(clusters),
        alternatives=tuple(alternatives(task, everywhere, best)),
        notes=tuple(notes),
    )


def fastest(task: Task, places: Sequence[Place]) -> Setting | None:
    """The setting with the shortest step on the slowest of `places`; among equals the one that takes least
    device memory. None: none fits.
    """
    found = []
    shortest = float("inf")
    for family in families(task, places):
        if one := _best_of(task, family, places, shortest):
            found.append(one)
            shortest = min(shortest, one[0])
    if not found:
        return None
    equal = [narrowest(task, setting, places, shortest) for time, setting in found if time == shortest]
    return min(equal, key=lambda setting: max(_peak(task, setting, place) for place in places))


def _best_of(
    task: Task, family: Setting, places: Sequence[Place], bound: float = float("inf")
) -> tuple[float, Setting] | None:
    """(time, setting) of the fastest way to spend memory on a family, the one with the fewest slots among
    equals. None: it does not fit, or not even its arithmetic is done within `bound`.
    """
    best = None
    for setting in grown(task, family, places):
        at_least = _rounded(max(arithmetic_of(task, setting, place) for place in places))
        if at_least > bound or (best is not None and at_least >= best[0]):
            break  # more slots leave less for activations, so that arithmetic only grows from here
        time = _time(task, setting, places)
        if best is None or time < best[0]:
            best = time, setting
    return best


def narrowest(task: Task, setting: Setting, places: Sequence[Place], time: float) -> Setting:
    """The setting with as few kept activations, then as few slots (quantised: resident blocks) as keep its
    time, which leaves memory free where loads hide anyway.
    """
    if setting.tier == "stock":
        return setting

    def keeps(changed: Setting) -> bool:
        return _time(task, changed, places) <= time

    one = kept_bytes(task, setting)
    fewest = least(
        0, setting.activation_bytes // one, lambda n: keeps(replace(setting, activation_bytes=n * one))
    )
    setting = replace(setting, activation_bytes=fewest * one)
    if setting.tier in STREAMED:
        return replace(
            setting,
            block_slots=least(1, setting.block_slots, lambda n: keeps(replace(setting, block_slots=n))),
        )
    if setting.tier in QUANTISED:
        fewest = least(0, setting.resident_blocks, lambda n: keeps(replace(setting, resident_blocks=n)))
        return replace(setting, resident_blocks=fewest)
    return setting


def alternatives(task: Task, places: Sequence[Place], best: Setting) -> Iterator[Alternative]:
    """The best of every other tier; of the winner's own tier the best with another micro-batch, client slots,
    or place for block inputs, and itself with other slots or no activations.
    """
    kinds: dict[str, list[Setting]] = {}
    for family in families(task, places):
        same = _label(family) == _label(best)
        labels = [] if same else [_label(family)]
        if same:
            differing = [
                f"{name}={value}"
                for name, value, chosen in (
                    ("train.micro_batch", family.micro_batch, best.micro_batch),
                    ("engine.client_slots", family.client_slots, best.client_slots),
                    ("engine.block_inputs", family.block_inputs, best.block_inputs),
                )
                if value != chosen
            ]
            labels = differing if len(differing) == 1 else []
        for label in labels:
            kinds.setdefault(label, []).append(family)
    won = _time(task, best, places)
    for label, settings in kinds.items():
        weighed = [found for family in settings if (found := _best_of(task, family, places))]
        if weighed:
            time, setting = min(weighed, key=lambda pair: pair[0])
            yield _slower(label, task, narrowest(task, setting, places, time), best, places=places, won=won)
        else:
            yield Alternative(label, f"does not fit: {shortage(task, most_frugal(settings), places)}")
    for label, setting in _varied(task, best):
        if all(fits(task, setting, place) for place in places):
            yield _slower(label, task, setting, best, places=places, won=won)
        else:
            _, lacks = max((lack(task, setting, place) for place in places), key=lambda pair: pair[0])
            yield Alternative(label, f"does not fit: {lacks}")


def _varied(task: Task, best: Setting) -> Iterator[tuple[str, Setting]]:
    if best.tier in STREAMED:
        for slots in (best.block_slots - 1, best.block_slots + 1):
            if 1 <= slots <= task.shape.layers - best.resident_blocks:
                yield f"engine.block_slots={slots}", replace(best, block_slots=slots)
    if best.activation_bytes:
        yield "engine.activation_gib=0", replace(best, activation_bytes=0)


def _slower(
    label: str, task: Task, setting: Setting, best: Setting, *, places: Sequence[Place], won: float
) -> Alternative:
    time = _time(task, setting, places)
    reason = (
        f"{time:.2f} s a step against {won:.2f} s"
        if time > won
        else f"as fast ({time:.2f} s), {_more_memory(task, setting, best, places)}"
    )
    return Alternative(label, reason, setting, time)


def _more_memory(task: Task, setting: Setting, best: Setting, places: Sequence[Place]) -> str:
    more = max(_peak(task, setting, place) for place in places) - max(
        _peak(task, best, place) for place in places
    )
    return (
        f"but takes {more / GIB:.2f} GiB more device memory"
        if more > 0
        else f"device memory differs by {more / GIB:.2f} GiB"
    )


def _label(setting: Setting) -> str:
    return setting.tier + (", recomputing" if setting.checkpointing else "")


def _peak(task: Task, setting: Setting, place: Place) -> int:
    memory = memory_of(task, setting, place)
    return memory.gpu_bytes or memory.ram_bytes


def _time(task: Task, setting: Setting, places: Sequence[Place]) -> float:
    return _rounded(max(seconds_of(task, setting, place).total for place in places))


def _rounded(seconds: float) -> float:
    return round(seconds / TINY_S) * TINY_S


def _forecast(task: Task, setting: Setting, name: str, places: Sequence[Place]) -> Forecast:
    """Of one cluster. Its peaks by cause are those of the rank with least to spare."""
    tightest = min(places, key=lambda place: min(spare_bytes(memory_of(task, setting, place), place)))
    seconds = max((seconds_of(task, setting, place) for place in places), key=lambda s: s.total)
    return Forecast(name, memory_of(task, setting, tightest), seconds, tightest)

"""The fastest setting that fits, and why the alternatives are slower. Pure.

Every setting is evaluated on every distinct profile. The slowest rank of the slowest cluster counts, since
it ends the round.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fedspeed.cluster.topology import Topology
from fedspeed.planner.bisection import smallest
from fedspeed.planner.changes import refusal
from fedspeed.planner.fitting import (
    candidates,
    describe_shortage,
    fits_everywhere,
    least_demanding_of,
    spare_bytes,
    variants,
    worst_shortage,
)
from fedspeed.planner.hardware import GIB, Node
from fedspeed.planner.memory import kept_bytes, memory_of
from fedspeed.planner.plan import (
    STREAMED,
    Alternative,
    ClusterPlan,
    Forecast,
    Plan,
    RankProfile,
    Setting,
    Task,
)
from fedspeed.planner.profiles import profiles_of
from fedspeed.planner.timing import arithmetic_of, seconds_of
from fedspeed.schedule.limits import QUANTISED

TIME_RESOLUTION_S = 1e-6  # times that differ by less are equal


def plan(task: Task, topology: Topology, nodes: Mapping[str, Node], notes: Sequence[str] = ()) -> Plan:
    """Plan a task for the clients of a topology.

    Args:
        nodes: by host name, at least those that train.

    Raises:
        PlanError: nothing fits; its `changes` are those that would make it fit.
    """
    profiles = profiles_of(topology, nodes)
    everywhere = [profile for group in profiles.values() for profile in group]
    best = fastest(task, everywhere)
    if best is None:
        raise refusal(task, profiles)
    clusters = []
    for name, group in profiles.items():
        preferred = best if len(profiles) == 1 else fastest(task, group)
        assert preferred is not None, "what fits all clusters fits this one"
        clusters.append(
            ClusterPlan(
                name,
                tuple(group),
                _forecast(task, best, name, group),
                preferred,
                _forecast(task, preferred, name, group),
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


def fastest(task: Task, profiles: Sequence[RankProfile]) -> Setting | None:
    """Return the setting with the shortest step on the slowest profile; among equally fast ones, that with
    the smallest peak of device memory. Return None if no setting fits.
    """
    found = []
    shortest = float("inf")
    for candidate in candidates(task, profiles):
        if best := _best_variant(task, candidate, profiles, shortest):
            found.append(best)
            shortest = min(shortest, best[0])
    if not found:
        return None
    equal = [
        with_least_memory(task, setting, profiles, shortest) for time, setting in found if time == shortest
    ]
    return min(equal, key=lambda setting: max(_peak(task, setting, profile) for profile in profiles))


def _best_variant(
    task: Task, candidate: Setting, profiles: Sequence[RankProfile], bound: float = float("inf")
) -> tuple[float, Setting] | None:
    """Return (step time, setting) of a candidate's fastest variant, with the fewest slots among equals.

    Return None if the candidate does not fit, or if its arithmetic alone takes longer than `bound` seconds.
    """
    best = None
    for setting in variants(task, candidate, profiles):
        at_least = _rounded(max(arithmetic_of(task, setting, profile) for profile in profiles))
        if at_least > bound or (best is not None and at_least >= best[0]):
            break  # more slots leave less memory for activations, so that the arithmetic only grows from here
        time = _time(task, setting, profiles)
        if best is None or time < best[0]:
            best = time, setting
    return best


def with_least_memory(task: Task, setting: Setting, profiles: Sequence[RankProfile], time: float) -> Setting:
    """Return a setting with the fewest kept activations, then the fewest slots (in a quantised tier: resident
    blocks), with which a step still takes no longer than `time` seconds. Where loads are hidden anyway, this
    leaves memory free.
    """
    if setting.tier == "stock":
        return setting

    def is_fast(changed: Setting) -> bool:
        return _time(task, changed, profiles) <= time

    one = kept_bytes(task, setting)
    fewest = smallest(
        0, setting.activation_bytes // one, lambda n: is_fast(replace(setting, activation_bytes=n * one))
    )
    setting = replace(setting, activation_bytes=fewest * one)
    if setting.tier in STREAMED:
        fewest = smallest(1, setting.block_slots, lambda n: is_fast(replace(setting, block_slots=n)))
        return replace(setting, block_slots=fewest)
    if setting.tier in QUANTISED:
        fewest = smallest(0, setting.resident_blocks, lambda n: is_fast(replace(setting, resident_blocks=n)))
        return replace(setting, resident_blocks=fewest)
    return setting


def alternatives(task: Task, profiles: Sequence[RankProfile], best: Setting) -> Iterator[Alternative]:
    """Yield the settings that the plan rejects, each with its reason.

    These are the best setting of every other tier; in the chosen tier the best setting with another
    micro-batch, number of client slots or memory for block inputs; and the chosen setting with one slot more
    or less, or without kept activations.
    """
    kinds: dict[str, list[Setting]] = {}
    for candidate in candidates(task, profiles):
        if label := _kind(candidate, best):
            kinds.setdefault(label, []).append(candidate)
    best_time = _time(task, best, profiles)
    for label, settings in kinds.items():
        found = [pair for candidate in settings if (pair := _best_variant(task, candidate, profiles))]
        if found:
            time, setting = min(found, key=lambda pair: pair[0])
            setting = with_least_memory(task, setting, profiles, time)
            yield _slower(label, task, setting, best, profiles=profiles, best_time=best_time)
        else:
            shortage = describe_shortage(task, least_demanding_of(settings), profiles)
            yield Alternative(label, f"does not fit: {shortage}")
    for label, setting in _variations(task, best):
        if fits_everywhere(task, setting, profiles):
            yield _slower(label, task, setting, best, profiles=profiles, best_time=best_time)
        else:
            _, shortage = worst_shortage(task, setting, profiles)
            yield Alternative(label, f"does not fit: {shortage}")


def _kind(candidate: Setting, best: Setting) -> str:
    """Return what distinguishes a candidate from the best setting: its tier, or one key. Return an empty text
    if it differs in several keys, or in none.
    """
    if _tier_label(candidate) != _tier_label(best):
        return _tier_label(candidate)
    differing = [
        f"{key}={value}"
        for key, value, chosen in (
            ("train.micro_batch", candidate.micro_batch, best.micro_batch),
            ("engine.client_slots", candidate.client_slots, best.client_slots),
            ("engine.block_inputs", candidate.block_inputs, best.block_inputs),
        )
        if value != chosen
    ]
    return differing[0] if len(differing) == 1 else ""


def _variations(task: Task, best: Setting) -> Iterator[tuple[str, Setting]]:
    if best.tier in STREAMED:
        for slots in (best.block_slots - 1, best.block_slots + 1):
            if 1 <= slots <= task.shape.layers - best.resident_blocks:
                yield f"engine.block_slots={slots}", replace(best, block_slots=slots)
    if best.activation_bytes:
        yield "engine.activation_gib=0", replace(best, activation_bytes=0)


def _slower(
    label: str,
    task: Task,
    setting: Setting,
    best: Setting,
    *,
    profiles: Sequence[RankProfile],
    best_time: float,
) -> Alternative:
    time = _time(task, setting, profiles)
    if time > best_time:
        reason = f"{time:.2f} s a step against {best_time:.2f} s"
    else:
        reason = f"as fast ({time:.2f} s), {_more_memory(task, setting, best, profiles)}"
    return Alternative(label, reason, setting, time)


def _more_memory(task: Task, setting: Setting, best: Setting, profiles: Sequence[RankProfile]) -> str:
    more = max(_peak(task, setting, profile) for profile in profiles) - max(
        _peak(task, best, profile) for profile in profiles
    )
    if more > 0:
        return f"but takes {more / GIB:.2f} GiB more device memory"
    return f"device memory differs by {more / GIB:.2f} GiB"


def _tier_label(setting: Setting) -> str:
    return setting.tier + (", recomputing" if setting.checkpointing else "")


def _peak(task: Task, setting: Setting, profile: RankProfile) -> int:
    memory = memory_of(task, setting, profile)
    return memory.gpu_bytes or memory.ram_bytes


def _time(task: Task, setting: Setting, profiles: Sequence[RankProfile]) -> float:
    return _rounded(max(seconds_of(task, setting, profile).total for profile in profiles))


def _rounded(seconds: float) -> float:
    return round(seconds / TIME_RESOLUTION_S) * TIME_RESOLUTION_S


def _forecast(task: Task, setting: Setting, name: str, profiles: Sequence[RankProfile]) -> Forecast:
    """Predict memory and time of a setting on a cluster. The peaks are those of the profile with least
    memory to spare.
    """
    tightest = min(profiles, key=lambda profile: min(spare_bytes(memory_of(task, setting, profile), profile)))
    seconds = max((seconds_of(task, setting, profile) for profile in profiles), key=lambda s: s.total)
    return Forecast(name, memory_of(task, setting, tightest), seconds, tightest)

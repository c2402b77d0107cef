"""FedSpeed's own ways to train a case: the planner's setting, and the one with the least memory. Pure."""

from dataclasses import replace

from benchmarks.compare.simulated.cases import Case, Placement, placed
from benchmarks.compare.simulated.exchange import anonymous_s, exchange_s
from benchmarks.compare.simulated.memory import need_of
from benchmarks.compare.simulated.outcome import Division, Outcome
from fedspeed.errors import PlanError
from fedspeed.planner.memory import memory_of
from fedspeed.planner.plan import STREAMED, RankProfile, Setting
from fedspeed.planner.search import fastest
from fedspeed.planner.timing import seconds_of

METHOD = "lora_average"
CHOSEN = "fedspeed"
LEAST = "fedspeed, least memory"
PLAIN = "fedspeed, plain sum"
OVERLAPPED = "fedspeed, staleness 1"
LEAST_LOGITS_MIB = 64  # engine.logits_mib with the least memory: still hundreds of rows in a product
WAYS = (CHOSEN, LEAST, PLAIN, OVERLAPPED)


def trained(case: Case) -> dict[str, Outcome]:
    """Return FedSpeed's outcomes by way: the planner's setting with the anonymous exchange, the same with the
    plain sum and with staleness 1, and the setting with the least memory. Empty if nothing fits.
    """
    placement = placed(METHOD, case)
    profiles = _distinct(placement)
    try:
        setting = fastest(placement.task, profiles)
    except PlanError:
        setting = None
    if setting is None:
        return {}
    chosen = outcome_of(case, placement, setting, CHOSEN)
    least = Setting("ram", 1, case.rows, block_slots=1, block_inputs="host")
    small = replace(placement, task=replace(placement.task, logits_mib=LEAST_LOGITS_MIB))
    return {
        CHOSEN: chosen,
        LEAST: outcome_of(case, small, least, LEAST),
        PLAIN: replace(chosen, method=PLAIN, exchange=exchange_s(placement, 1)),
        OVERLAPPED: replace(chosen, method=OVERLAPPED, staleness=True),
    }


def _distinct(placement: Placement) -> list[RankProfile]:
    found: list[RankProfile] = []
    for rank in placement.ranks:
        found += [] if rank in found else [rank]
    return found


def outcome_of(case: Case, placement: Placement, setting: Setting, way: str) -> Outcome:
    """Return the outcome of one of the planner's settings, with the anonymous exchange."""
    task = placement.task
    kinds = placement.kinds
    return Outcome(
        way,
        "",
        describe(setting, task.logits_mib),
        Division(setting.micro_batch, setting.accumulation),
        needs={kind: need_of(memory_of(task, setting, rank), rank) for kind, rank in kinds.items()},
        steps={kind: dict(seconds_of(task, setting, rank).causes) for kind, rank in kinds.items()},
        clients=case.clients,
        rows=case.rows * placement.client_ranks,
        tokens=case.tokens,
        local_steps=task.local_steps,
        epoch=case.epoch,
        exchange=anonymous_s(placement),
    )


def describe(setting: Setting, logits_mib: int | str = "auto") -> str:
    """Return the essence of a setting."""
    rows = f"{setting.accumulation} x {setting.micro_batch} rows a rank"
    slots = f", {setting.block_slots} slots" if setting.tier in STREAMED else ""
    logits = f", engine.logits_mib={logits_mib}" if logits_mib != "auto" else ""
    return f"engine.tier={setting.tier}{slots}, {rows}{logits}"

"""Where FedSpeed's advantage over each baseline is largest: a search over settings in which a user of the
mission's hardware would be. Pure.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.compare.simulated.cases import BASELINES, Case, placed, shape_of
from benchmarks.compare.simulated.fedspeed import CHOSEN, METHOD, trained
from benchmarks.compare.simulated.outcome import Outcome, outcomes, variants_of
from fedspeed.cluster.hostfile import Host
from fedspeed.errors import FedSpeedError
from fedspeed.planner.memory import base_bytes
from fedspeed.planner.simulate import MODELS

ROWS = (1, 4, 16, 64)  # of a local step, on each rank
TOKENS = (128, 512, 2048)  # of a row
CLIENTS = (3, 9, 16)
# Servers with two cards each, on 10 Gbit/s: cards and how many servers have them. One is a method's server.
FLEETS = ((("rtx2080ti", 11),), (("rtx3090", 11),), (("rtx3090", 7), ("rtx2080ti", 3)))
MANY_ROWS = 16  # of a step on each rank
EPOCH = 7_954  # rows, those of Fed-CodeAlpaca
TIME_GOAL = 17.0
RATE_GOAL = 18.0
LOADS = "waiting for loads"
TURNS = "clients in turn instead of at the same time"
SERVER = "a server's steps while clients wait"
EXCHANGE = "the exchange"
AGAIN = "blocks computed again"
OTHER = "arithmetic"
NOT_IN_STEPS = (SERVER, EXCHANGE)  # of a round, but not of its local steps


@dataclass(frozen=True)
class Ratio:
    """FedSpeed beside a baseline in one case.

    Attributes:
        time: hours of the baseline's epoch over FedSpeed's. rate: FedSpeed's tokens/s during local steps over
            the baseline's.
        mechanism, rate_mechanism: what most of the baseline's additional seconds are, with their share; of
            the epoch, and of its local steps.
    """

    case: Case
    baseline: Outcome
    own: Outcome
    time: float
    rate: float
    mechanism: str
    rate_mechanism: str


def ratio_of(case: Case, baseline: Outcome, own: Outcome) -> Ratio:
    """Compare two outcomes of a case."""
    return Ratio(
        case,
        baseline,
        own,
        time=baseline.hours / own.hours,
        rate=own.training_rate / baseline.training_rate,
        mechanism=_mechanism(baseline, own),
        rate_mechanism=_mechanism(baseline, own, without=NOT_IN_STEPS),
    )


def causes_of(outcome: Outcome) -> dict[str, float]:
    """Return the seconds of an epoch by what they are spent on, for the slowest client; they add up to the
    epoch without staleness.
    """
    slowest = max(outcome.steps.values(), key=lambda causes: sum(causes.values()))
    rounds = outcome.epoch / (outcome.clients * outcome.rows * outcome.local_steps)
    number = rounds * outcome.local_steps
    step = sum(slowest.values())
    again = slowest.get("again", 0.0)
    waited = slowest.get("waiting for loads", 0.0)
    return {
        LOADS: number * waited,
        TURNS: number * ((outcome.in_turn or step) - step),
        SERVER: outcome.first + rounds * outcome.server,
        EXCHANGE: rounds * outcome.exchange,
        AGAIN: number * again,
        OTHER: number * (step - waited - again),
    }


def _mechanism(baseline: Outcome, own: Outcome, without: Sequence[str] = ()) -> str:
    """Return what most of the baseline's additional seconds are; empty where it is the faster one."""
    mine = causes_of(own)
    more = {
        cause: seconds - mine[cause] for cause, seconds in causes_of(baseline).items() if cause not in without
    }
    whole = sum(more.values())
    if whole <= 0:
        return ""
    cause = max(more, key=lambda name: more[name])
    return f"{cause}{_detail(cause, baseline, own)} ({min(1.0, more[cause] / whole):.0%} of the difference)"


def _detail(cause: str, baseline: Outcome, own: Outcome) -> str:
    """Return what a baseline does otherwise, as far as its division of a step's rows tells it."""
    shared = own.division.micro_batch * own.division.accumulation  # rows that a load of FedSpeed's is for
    if cause == LOADS and baseline.division.micro_batch < shared:
        return " that only the rows of a micro-batch share"
    if cause == LOADS:
        return " of blocks that FedSpeed keeps, or shares among clients of a rank"
    if cause == OTHER and baseline.division.micro_batch < own.division.micro_batch:
        return " in smaller micro-batches"
    return " of more operations" if cause == OTHER else ""


def cases() -> Iterator[Case]:
    """Yield the cases that are searched."""
    for model, rows, tokens, clients, fleet in product(MODELS, ROWS, TOKENS, CLIENTS, FLEETS):
        cards = [card for card, count in fleet for _ in range(count)]
        hosts = tuple(
            Host(f"node{number}", 2, cluster=card, gpu=card, link_gbps=10)
            for number, card in enumerate(cards, start=1)
        )
        yield Case(shape_of(model), clients, EPOCH, tokens=tokens, rows=rows, hosts=hosts)


def is_missions(case: Case) -> bool:
    """Return whether a case is the mission's: the base alone is too large for the cards of some client, and a
    step has many rows, which a method may divide into micro-batches.
    """
    placement = placed(METHOD, case)
    smallest = min(rank.node.device.memory for rank in placement.ranks)
    return base_bytes(placement.task) > smallest and case.rows >= MANY_ROWS


@dataclass(frozen=True)
class Found:
    """What the search has found of one baseline in one variant.

    Attributes:
        time, rate: the settings with the largest ratios; None: it can run in none of them. missions_time,
            missions_rate: the same among the mission's cases.
        runs: cases in which it can run. cases: those in which FedSpeed can. reached_time, reached_rate: cases
            whose ratios reach the goals.
        short: by model and cards, in how many of those cases it does not fit. refused: in how many its
            implementation refuses the model.
    """

    baseline: str
    variant: str
    time: Ratio | None
    rate: Ratio | None
    missions_time: Ratio | None
    missions_rate: Ratio | None
    runs: int
    cases: int
    short: dict[str, int]
    refused: int
    reached_time: int
    reached_rate: int


def search(searched: Sequence[Case], progress: Callable[[int], None] = lambda done: None) -> list[Found]:
    """Return the largest ratios of every baseline in every variant.

    Args:
        progress: called with the number of cases that are done.
    """
    keys = [(method, variant) for method in BASELINES for variant in variants_of(method)]
    ratios: dict[tuple[str, str], list[Ratio]] = {key: [] for key in keys}
    short: dict[tuple[str, str], dict[str, int]] = {key: {} for key in keys}
    refused = dict.fromkeys(keys, 0)
    possible = 0
    for done, case in enumerate(searched, start=1):
        own = trained(case).get(CHOSEN)
        if own is not None:
            possible += 1
            for key in keys:
                try:
                    found = outcomes(key[0], case, key[1])
                except FedSpeedError:
                    refused[key] += 1
                    continue
                if found.fits:
                    ratios[key].append(ratio_of(case, found, own))
                else:
                    where = f"{case.shape.name}, {case.devices}"
                    short[key][where] = short[key].get(where, 0) + 1
        progress(done)
    return [_found(key, ratios[key], possible, short=short[key], refused=refused[key]) for key in keys]


def _found(
    key: tuple[str, str], ratios: Sequence[Ratio], possible: int, *, short: dict[str, int], refused: int
) -> Found:
    missions = [ratio for ratio in ratios if is_missions(ratio.case)]
    return Found(
        *key,
        time=max(ratios, key=lambda ratio: ratio.time, default=None),
        rate=max(ratios, key=lambda ratio: ratio.rate, default=None),
        missions_time=max(missions, key=lambda ratio: ratio.time, default=None),
        missions_rate=max(missions, key=lambda ratio: ratio.rate, default=None),
        runs=len(ratios),
        cases=possible,
        short=short,
        refused=refused,
        reached_time=sum(ratio.time >= TIME_GOAL for ratio in ratios),
        reached_rate=sum(ratio.rate >= RATE_GOAL for ratio in ratios),
    )

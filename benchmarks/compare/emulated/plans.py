"""What is emulated: each method's outcome by the simulator, for few local steps, and the sleeps that follow
from it. Pure.
"""

from dataclasses import dataclass, replace

from benchmarks.compare.emulated.seconds import Seconds, of_body, of_ends, of_step
from benchmarks.compare.simulated import steps
from benchmarks.compare.simulated.cases import BASELINES, Case, Placement, placed
from benchmarks.compare.simulated.exchange import anonymous_s, exchange_s, instance
from benchmarks.compare.simulated.fedspeed import CHOSEN, METHOD, OVERLAPPED, PLAIN, trained
from benchmarks.compare.simulated.outcome import BEST, Outcome, outcomes
from fedspeed.federation.methods.base import method_class

OWN = (CHOSEN, PLAIN, OVERLAPPED)
# Ways that the real program can be run in by name.
WAYS = (*OWN, *BASELINES)


@dataclass(frozen=True)
class Plan:
    """A run to emulate.

    Attributes:
        way: a name of WAYS. case: whose rows are those of a rank. local_steps: of a round.
        simulated: the outcome for so many local steps. micro_batch, accumulation: of a client, whose one rank
            stands for all its cards. sleeps: by host.
        values: summed in a round.
    """

    way: str
    case: Case
    local_steps: int
    simulated: Outcome
    micro_batch: int
    accumulation: int
    sleeps: dict[str, Seconds]
    values: int

    @property
    def method(self) -> str:
        """Return the value of federation.method."""
        return METHOD if self.way in OWN else self.way

    @property
    def hosts(self) -> tuple[str, ...]:
        """Return the hosts that take part, in the hostfile's order."""
        return tuple(self.sleeps)


def plan_of(way: str, case: Case, local_steps: int) -> Plan:
    """Return what is to be run.

    Raises:
        FedSpeedError: the method cannot train this model.
    """
    own = way in OWN
    method = METHOD if own else way
    placement = placed(method, case)
    simulated = trained(case)[way] if own else outcomes(method, case, BEST)
    exchange = anonymous_s(placement) if way in (CHOSEN, OVERLAPPED) else exchange_s(placement, local_steps)
    simulated = replace(simulated, local_steps=local_steps, exchange=exchange)
    division = simulated.division
    return Plan(
        way,
        case,
        local_steps,
        simulated,
        micro_batch=division.micro_batch * placement.client_ranks,
        accumulation=division.accumulation,
        sleeps=_sleeps(placement, simulated),
        values=instance(placement).values(1),
    )


def _sleeps(placement: Placement, simulated: Outcome) -> dict[str, Seconds]:
    """Return the sleeps of the hosts that take part."""
    sleeps: dict[str, Seconds] = {}
    ranks = [rank for rank in placement.topology.ranks if rank.clients]
    for rank, profile in zip(ranks, placement.ranks, strict=True):
        causes = simulated.steps[profile.node.device.name]
        if simulated.method == "m2fedsa":
            sleeps[rank.host] = of_ends(causes, simulated.division.accumulation)
        else:
            sleeps[rank.host] = of_step(causes)
    if placement.server is None:
        return sleeps
    server = next(
        rank.host for rank in placement.topology.ranks if rank.world_rank in placement.topology.server
    )
    if simulated.method == "m2fedsa":
        causes = next(iter(simulated.steps.values()))  # the server's part is alike for all clients
        own = of_body(causes, simulated.division.accumulation)
    else:
        options = placement.config.federation.method
        task = method_class(simulated.method).planned(options, placement.task, role="server")
        assert task is not None, "FedBiOT has a server"
        one = steps.stock_setting(1, 1, checkpointing=False)
        own = of_step(steps.alignment_step(task, one, placement.server))
    return {server: own} | sleeps

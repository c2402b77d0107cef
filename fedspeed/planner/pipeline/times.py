"""How long a pipeline's instructions take, from speeds and sizes: what `execute` asks. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspeed.schedule.instructions import Backward, Embed, Forward, Head, Instruction, Send, Step


@dataclass(frozen=True)
class PipelineTimes:
    """Micro-batches are of one size.

    Attributes:
        forward, backward: seconds of each chunk on the rank that holds it.
        heads, steps, embeds: seconds of a head, an optimizer step and an embedding, by rank.
        nbytes: of an activation, and of its gradient.
        hosts: of each rank; ranks of one host have its link to the others in common.
        rates: bytes/s of each host's link, each way; local_rate: between ranks of one host. latency: seconds
            of every transfer beside.
        loads: seconds in which each chunk is fetched; empty where chunks stay. slots: as in `execute.Times`.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    heads: Sequence[float]
    steps: Sequence[float]
    embeds: Sequence[float]
    nbytes: int
    hosts: Sequence[str]
    rates: Mapping[str, float]
    local_rate: float
    latency: float = 0.0
    loads: Sequence[float] = ()
    slots: int = 2

    def compute(self, work: Instruction, rank: int) -> float:
        if isinstance(work, Forward):
            return self.forward[work.chunk]
        if isinstance(work, Backward):
            return self.backward[work.chunk]
        return {Head: self.heads, Step: self.steps, Embed: self.embeds}[type(work)][rank]

    def transfer(self, work: Send, rank: int) -> tuple[float, tuple[object, ...]]:
        here = self.hosts[rank]
        there = self.hosts[work.to]
        if here == there:
            return self.latency + self.nbytes / self.local_rate, ((here, "inside"),)
        return self.latency + self.nbytes / min(self.rates[here], self.rates[there]), (
            (here, "out"),
            (there, "in"),
        )

    def load(self, chunk: int, rank: int) -> float:
        return self.loads[chunk]

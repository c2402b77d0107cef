"""The seconds of a pipeline's instructions, from speeds and sizes. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspeed.schedule.instructions import Backward, Embed, Forward, Head, Instruction, Loaded, Send, Step


@dataclass(frozen=True)
class PipelineTimes:
    """The seconds of a pipeline's instructions, for micro-batches of one size (see `execute.Times`).

    Attributes:
        forward: seconds of each chunk's forward pass on its rank.
        backward: seconds of each chunk's backward pass on its rank.
        heads: seconds of head and loss, by rank.
        steps: seconds of an optimizer step, by rank.
        embeds: seconds of an embedding, by rank.
        nbytes: bytes of an activation, and of its gradient.
        hosts: host of each rank; the ranks of a host share its link.
        rates: bytes/s of each host's link, in each direction.
        local_rate: bytes/s between ranks of one host.
        latency: seconds that every transfer takes in addition.
        loads: seconds to load each chunk; empty if chunks stay on the device.
        slots: chunks that fit on a device at the same time, if chunks are loaded.
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
        """Return the seconds of an Embed, Forward, Head, Backward or Step."""
        if isinstance(work, Forward):
            return self.forward[work.chunk]
        if isinstance(work, Backward):
            return self.backward[work.chunk]
        by_rank: dict[type, Sequence[float]] = {Head: self.heads, Step: self.steps, Embed: self.embeds}
        return by_rank[type(work)][rank]

    def transfer(self, work: Send, rank: int) -> tuple[float, tuple[object, ...]]:
        """Return (seconds, links used) of a transfer, within a host or over the links of two hosts."""
        here = self.hosts[rank]
        there = self.hosts[work.to]
        if here == there:
            return self.latency + self.nbytes / self.local_rate, ((here, "inside"),)
        return self.latency + self.nbytes / min(self.rates[here], self.rates[there]), (
            (here, "out"),
            (there, "in"),
        )

    def load(self, chunk: Loaded, rank: int) -> float:
        """Return the seconds of loading a chunk."""
        assert isinstance(chunk, int), "pipelines do not load the embedding or the head"
        return self.loads[chunk]

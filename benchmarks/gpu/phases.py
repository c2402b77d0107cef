"""The phases of the campaign in the order of their value, with their time limits."""

from dataclasses import dataclass, field
from importlib import import_module


@dataclass(frozen=True)
class Phase:
    """A part of the campaign that runs in a process of its own.

    Attributes:
        name: of the phase and of its file of results.
        call: full name of the function that is called with a Scene.
        minutes: limit, after which the phase is killed.
        options: read by that function.
        guards: whether the campaign ends if it fails.
    """

    name: str
    call: str
    minutes: float
    options: dict = field(default_factory=dict)
    guards: bool = False

    def run(self, scene) -> None:
        """Call the function of the phase."""
        module, _, function = self.call.rpartition(".")
        getattr(import_module(module), function)(scene)


LISTS = {
    "first": (
        Phase("link", "benchmarks.gpu.link.run", 0.75),
        Phase("smoke", "benchmarks.gpu.smoke.run", 1.0, guards=True),
        Phase("perf-7b-11gib", "benchmarks.gpu.perf.run", 3.0, {"model": "7B", "cap": 11}),
        Phase("stock-7b-11gib", "benchmarks.gpu.stock.run", 1.7, {"model": "7B", "cap": 11}),
        Phase("perf-14b-24gib", "benchmarks.gpu.perf.run", 2.5, {"model": "14B", "cap": 24}),
        Phase("roundpipe-14b-24gib", "benchmarks.gpu.roundpipe.run", 1.5, {"model": "14B", "cap": 24}),
    ),
    "second": (
        Phase("perf-14b-11gib", "benchmarks.gpu.perf.run", 2.5, {"model": "14B", "cap": 11}),
        Phase("fp16-accumulation", "benchmarks.gpu.variants.accumulation", 1.5, {"model": "7B", "blocks": 8}),
        Phase("nf4-resident", "benchmarks.gpu.variants.nf4", 2.0, {"model": "7B", "cap": 11}),
        Phase("compiled-blocks", "benchmarks.gpu.variants.compiled", 1.5, {"model": "7B", "blocks": 8}),
        Phase("quickstart", "benchmarks.gpu.command_line.quickstart", 1.0),
        Phase("masked", "benchmarks.gpu.command_line.masked", 1.5),
    ),
}
EVERY = {phase.name: phase for phases in LISTS.values() for phase in phases}


def chosen(names: list[str], which: str, dry: bool) -> list[Phase]:
    """Return the named phases; without names those of a list, in a dry run those of all lists.

    Raises:
        ValueError: a name is unknown.
    """
    if unknown := [name for name in names if name not in EVERY]:
        raise ValueError(f"no phase is called {unknown[0]}; there are {', '.join(EVERY)}")
    if names:
        return [EVERY[name] for name in dict.fromkeys(names)]
    if which:
        return list(LISTS[which])
    return list(EVERY.values()) if dry else list(LISTS["first"])

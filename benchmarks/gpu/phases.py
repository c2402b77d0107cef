"""The phases of the campaign in the order of their value, and what each may take."""

from dataclasses import dataclass, field
from importlib import import_module


@dataclass(frozen=True)
class Phase:
    """A part of the campaign that runs in a process of its own.

    Attributes:
        name: of the phase and of its file of results.
        call: module of this package, and the function in it that is called with a Scene.
        minutes: after which it is killed.
        options: what that function reads.
        guards: whether nothing after it is worth the card's time if it fails.
    """

    name: str
    call: str
    minutes: float
    options: dict = field(default_factory=dict)
    guards: bool = False

    def run(self, scene) -> None:
        """Do what the phase is there for."""
        module, function = self.call.split(".")
        getattr(import_module(f"benchmarks.gpu.{module}"), function)(scene)


LISTS = {
    "first": (
        Phase("link", "link.run", 0.5),
        Phase("smoke", "smoke.run", 1.0, guards=True),
        Phase("perf-7b-11gib", "perf.run", 3.0, {"model": "7B", "cap": 11}),
        Phase("stock-7b-11gib", "stock.run", 1.7, {"model": "7B", "cap": 11}),
        Phase("perf-14b-24gib", "perf.run", 2.5, {"model": "14B", "cap": 24}),
        Phase("roundpipe-14b-24gib", "roundpipe.run", 1.5, {"model": "14B", "cap": 24}),
    ),
    "second": (
        Phase("perf-14b-11gib", "perf.run", 2.5, {"model": "14B", "cap": 11}),
        Phase("fp16-accumulation", "variants.accumulation", 1.5, {"model": "7B", "blocks": 8}),
        Phase("nf4-resident", "variants.nf4", 2.0, {"model": "7B", "cap": 11}),
        Phase("compiled-blocks", "variants.compiled", 1.5, {"model": "7B", "blocks": 8}),
        Phase("quickstart", "command_line.quickstart", 1.0),
        Phase("masked", "command_line.masked", 1.5),
    ),
}
EVERY = {phase.name: phase for phases in LISTS.values() for phase in phases}


def chosen(names: list[str], which: str, dry: bool) -> list[Phase]:
    """The phases that are named; none named: those of a list, in a dry run those of all lists.

    Raises:
        ValueError: there is no phase of a name.
    """
    if unknown := [name for name in names if name not in EVERY]:
        raise ValueError(f"no phase is called {unknown[0]}; there are {', '.join(EVERY)}")
    if names:
        return [EVERY[name] for name in names]
    if which:
        return list(LISTS[which])
    return list(EVERY.values()) if dry else list(LISTS["first"])

"""What a system is: the packages of its environment, and the commands that run the task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.compare.outside.task import FEDERATION


@dataclass(frozen=True, eq=False)
class Site:
    """Where a run takes place.

    Attributes:
        python: interpreter of the system's environment. folder: the task's files. scratch: an empty folder
            of the run.
    """

    python: Path
    folder: Path
    scratch: Path


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to run a system: a row of the table.

    Attributes:
        name: in tables. command: the command at a site. It prints a JSON line with "event": "round", "round"
            (from 1) and "val_loss" for each round; other lines are ignored.
        task: of benchmarks.compare.outside.task. reference: its losses are those that others of the task are
            held against. variables: of its environment.
    """

    name: str
    command: Callable[[Site], list[str]]
    task: str = FEDERATION
    reference: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class System:
    """A system that is compared.

    Attributes:
        name: as `--systems` names it. package: whose version is reported. environment: its folder's name.
        installs: pinned requirements; each tuple is one call of pip. Empty: the environment of FedSpeed.
        refusal: why it cannot run on this machine, from its interpreter; empty: it can. elsewhere: the
            command that measures it where it can.
    """

    name: str
    package: str
    variants: tuple[Variant, ...] = ()
    environment: str = ""
    installs: tuple[tuple[str, ...], ...] = ()
    refusal: Callable[[Path], str] | None = None
    elsewhere: str = ""


def module_command(site: Site, module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module of benchmarks.compare.outside."""
    return [str(site.python), "-m", f"benchmarks.compare.outside.{module}", *map(str, arguments)]

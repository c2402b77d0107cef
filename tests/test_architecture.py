"""The rooms import in one direction, and heavy libraries have one door each. Read from the source, so that nothing has to run."""

import ast

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "fedspeed"
LEAVES = "configuration leaves"  # modules called config.py, whatever folder they lie in: what a room may be told, next to the room
# From the ground up: a room may import those of earlier floors, and its own.
FLOORS = [
    ["errors", "files", "activity", "hub_names", "units", "net", LEAVES],
    ["schedule"],
    ["config"],
    ["cluster", "models", "data"],
    ["planner", "engine", "routing", "monitor", "checkpoint"],
    ["federation"],
    ["quickstart"],
    ["session"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"deepspeed": {"engine"}, "mpi4py": {"routing/transports/mpi"}}


def room_of(parts):
    """The room of a module, given by its path below the package."""
    return LEAVES if len(parts) > 1 and "config" in parts[1:] else parts[0]


def imports(path):
    """(module, line) of every import, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    inside = path.relative_to(PACKAGE).with_suffix("")
    room = room_of(inside.parts)
    for name, line in imports(path):
        parts = name.split(".")
        door = DOORS.get(parts[0])
        assert door is None or room in door or str(inside) in door, f"{path}:{line}: only {door} may import {parts[0]}"
        if parts[0] != "fedspeed" or parts[1] not in FLOOR:
            continue
        target = room_of(parts[1:])
        below = FLOOR[target] < FLOOR[room] or (target == room != LEAVES)
        assert below, f"{path}:{line}: {room} may not import {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_imported_is_there(path):
    """Also inside functions, which no import of the module would find."""
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "fedspeed" and len(parts) > 1:
            stems = [ROOT.joinpath(*parts[:end]) for end in (len(parts), len(parts) - 1) if end > 1]  # a module, or a name in one
            there = [stem for stem in stems if stem.with_suffix(".py").is_file() or (stem / "__init__.py").is_file()]
            assert there or len(parts) == 2, f"{path}:{line}: there is no {name}"


def test_every_room_is_on_the_map():
    assert {room_of(p.relative_to(PACKAGE).with_suffix("").parts) for p in FILES} == set(FLOOR)


@pytest.mark.parametrize("room", ["planner", "schedule"])
def test_what_decides_is_pure(room):
    """It computes; whoever calls it reads files and prints."""
    allowed = {"fedspeed", "collections", "dataclasses", "functools", "itertools", "math", "re", "typing"}
    for path in (PACKAGE / room).rglob("*.py"):
        for name, line in imports(path):
            assert name.split(".")[0] in allowed, f"{path}:{line}: {room} may not import {name}"

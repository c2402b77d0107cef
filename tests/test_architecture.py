"""The rooms import in one direction, and heavy libraries have one door each. Read from the source, so that nothing has to run."""

import ast

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "fedspeed"
LEAVES = "configuration leaves"  # modules called config.py, whatever folder they lie in: what a room may be told, next to the room
# From the ground up: a room may import those of earlier floors, and its own.
FLOORS = [
    ["errors", "files", "activity", "hub_names", "units", "log", "net", LEAVES],
    ["schedule"],
    ["config"],
    ["cluster", "models", "data"],
    ["planner", "engine", "routing", "monitor", "checkpoint"],
    ["federation"],
    ["evaluation"],
    ["quickstart"],
    ["session"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Modules that load a library which a supervisor, a dry run, `--help` or a run without masks must do without: torch and what stands on it take seconds of
# every start, and cryptography and mpi4py may not be installed. They are imported where they are used, inside functions; everything else of ours is
# imported at the top.
LATE = {
    "torch": {"engine/arithmetic", "engine/build", "evaluation/held_out", "evaluation/compare", "federation/parts", "federation/rounds",
              "federation/trainer", "models/blocks", "models/loading"},
    "cryptography": {"routing/anonymous/crypto", "routing/anonymous/exchange", "routing/anonymous/lockstep", "routing/identity", "routing/listening",
                     "routing/statement", "session/site"},
}
HELD_TO_LATE = {"session"}  # rooms
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


def module_of(name):
    """The file of ours, below the package and without its ending, that an imported name is or is in; None for what is not ours."""
    parts = name.split(".")[1:] if name.startswith("fedspeed.") else []
    return next(("/".join(parts[:end]) for end in range(len(parts), 0, -1) if PACKAGE.joinpath(*parts[:end]).with_suffix(".py").is_file()), None)


def first_imports(module):
    """Names that a module imports when it is imported itself."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    late = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    late |= {id(node) for test in ast.walk(tree) if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test) for node in ast.walk(test)}
    for node in ast.walk(tree):
        if id(node) not in late and isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif id(node) not in late and isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loads(module, seen):
    """All libraries that come with a module."""
    if module in seen:
        return
    seen.add(module)
    for name in first_imports(module):
        if own := module_of(name):
            yield from loads(own, seen)
        else:
            yield name.split(".")[0]


@pytest.mark.parametrize("library", LATE)
def test_what_is_imported_late_loads_what_it_is_late_for(library):
    for module in LATE[library]:
        assert library in set(loads(module, set())), f"{module} loads no {library}: import it at the top, and take it off the list"


@pytest.mark.parametrize("module", ["cli/command_line", "session/machine", "session/rehearsal", "session/rank"])
def test_what_starts_before_a_rank_computes_loads_no_torch(module):
    """The supervisor, a dry run, and a rank until it has met the others: `import` alone, for what functions import is on the list above."""
    assert {"torch", "transformers", "peft", "deepspeed", "mpi4py", "cryptography"} & set(loads(module, set())) == set()


@pytest.mark.parametrize("path", [path for path in FILES if path.relative_to(PACKAGE).parts[0] in HELD_TO_LATE], ids=lambda p: p.stem)
def test_only_what_is_listed_is_imported_late(path):
    module = "/".join(path.relative_to(PACKAGE).with_suffix("").parts)
    first = set(first_imports(module))
    for name, line in imports(path):
        own = module_of(name)
        assert own is None or name in first or own in set().union(*LATE.values()), f"{path}:{line}: import {name} at the top"


def test_every_room_is_on_the_map():
    assert {room_of(p.relative_to(PACKAGE).with_suffix("").parts) for p in FILES} == set(FLOOR)


@pytest.mark.parametrize("room", ["planner", "schedule"])
def test_what_decides_is_pure(room):
    """It computes; whoever calls it reads files and prints."""
    allowed = {"fedspeed", "collections", "dataclasses", "functools", "itertools", "math", "re", "typing"}
    for path in (PACKAGE / room).rglob("*.py"):
        for name, line in imports(path):
            assert name.split(".")[0] in allowed, f"{path}:{line}: {room} may not import {name}"

"""The rooms import in one direction, and heavy libraries have one door each. Read from the source, so that
nothing has to run.
"""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "fedspeed"
# Modules called config.py, whatever folder they lie in: what a room may be told, next to the room.
LEAVES = "configuration leaves"
# From the ground up: a room may import those of earlier floors, and its own.
FLOORS = [
    ["text_safety"],
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
# Modules that load a library which a supervisor, a dry run, `--help` or a run without masks must do without:
# torch and what stands on it take seconds of every start, and cryptography and mpi4py may not be installed.
# They are imported where they are used, inside functions, by whoever does not load the library anyway;
# everything else of ours is imported at the top.
LATE = {
    "torch": {
        "engine/arithmetic",
        "engine/build",
        "engine/client_engine",
        "engine/split/body",
        "engine/split/ends",
        "evaluation/compare",
        "evaluation/held_out",
        "evaluation/round_tasks",
        "evaluation/scoring",
        "federation/evaluators",
        "federation/rank_components",
        "federation/rounds",
        "federation/tensors",
        "federation/trainer",
        "models/adapters",
        "models/blocks",
        "models/loading",
    },
    "cryptography": {
        "routing/anonymous/crypto",
        "routing/anonymous/exchange",
        "routing/identity",
        "routing/listen_address",
        "routing/pairwise/encodings",
        "routing/pairwise/exchange",
        "routing/signed_broadcast",
        "session/settled_marks",
        "routing/state_certificate",
        "session/site",
        "session/site_agreement",
    },
    "lm_eval": {"evaluation/lm_eval_adapter", "evaluation/lm_eval_runs"},
}
# The one exception: `fedspeed --help` starts in under a second, so a command imports what it needs when it
# runs.
NOT_HELD_TO_LATE = {"cli"}
MAX_FILE_LINES = 399
MAX_FUNCTION_LINES = 60
DOORS = {
    "deepspeed": {"engine"},
    "mpi4py": {"routing/transports/mpi"},
    "lm_eval": {"evaluation/lm_eval_adapter", "evaluation/lm_eval_runs"},
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def inside(path):
    """Return a module's path below the package, without its ending."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


MODULES = [inside(path) for path in FILES]


@cache
def tree_of(module):
    """Return the syntax tree of a module."""
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def room_of(parts):
    """Return the room of a module, given by its path below the package."""
    return LEAVES if len(parts) > 1 and "config" in parts[1:] else parts[0]


def names_in(node):
    """Return the full names that a node of a syntax tree imports; none if it is no import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@cache
def imports(module):
    """Return (name, line) of every import of a module, including those inside functions."""
    nodes = list(ast.walk(tree_of(module)))
    relative = [n.lineno for n in nodes if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative, f"{module}: relative imports in lines {relative}"
    return [(name, node.lineno) for node in nodes for name in names_in(node)]


def is_late(node):
    """Say whether what lies in a node of a syntax tree is left out when the module is imported."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


@cache
def first_imports(module):
    """Return the names that a module imports when it is imported itself."""
    nodes = list(ast.walk(tree_of(module)))
    late = {id(inner) for node in nodes if is_late(node) for inner in ast.walk(node)}
    return frozenset(name for node in nodes if id(node) not in late for name in names_in(node))


def module_of(name):
    """Return the module of ours that an imported name is or is in; None for what is not ours."""
    parts = name.split(".")[1:] if name.startswith("fedspeed.") else []
    ends = range(len(parts), 0, -1)
    found = ("/".join(parts[:end]) for end in ends)
    return next((module for module in found if (PACKAGE / f"{module}.py").is_file()), None)


@cache
def loads(module):
    """Return all libraries that come with a module."""
    seen = {module}
    waiting = [module]
    libraries = set()
    while waiting:
        for name in first_imports(waiting.pop()):
            own = module_of(name)
            if own is None:
                libraries.add(name.split(".")[0])
            elif own not in seen:
                seen.add(own)
                waiting.append(own)
    return frozenset(libraries)


def late_imports(module):
    """Return (module of ours, line) of what a module of ours imports, but not when it is imported itself."""
    first = first_imports(module)
    found = [(module_of(name), line) for name, line in imports(module) if name not in first]
    return [(own, line) for own, line in found if own is not None]


def is_below(module, name):
    """Say whether what a module imports by a name stands on an earlier floor, or in its own room."""
    parts = name.split(".")
    if parts[0] != "fedspeed" or parts[1] not in FLOOR:
        return True
    room = room_of(module.split("/"))
    target = room_of(parts[1:])
    return FLOOR[target] < FLOOR[room] or (target == room != LEAVES)


def is_let_in(module, name):
    """Say whether a module may import what it imports by a name, if that is a library with one door."""
    door = DOORS.get(name.split(".")[0])
    return door is None or room_of(module.split("/")) in door or module in door


def is_there(name):
    """Say whether an imported name of ours is a module or a package, or may be a name in one."""
    stem = ROOT.joinpath(*name.split("."))
    whole = (stem.with_suffix(".py"), stem / "__init__.py")
    if not name.startswith("fedspeed.") or any(path.is_file() for path in whole):
        return True
    package = stem.parent / "__init__.py"
    is_named = package.is_file() and stem.name in package.read_text()
    return is_named or stem.parent.with_suffix(".py").is_file()


def faults(is_right, modules=MODULES):
    """Return the imports of modules that are not right, each as a text with its place."""
    found = [(module, name, line) for module in modules for name, line in imports(module)]
    return [f"{module}.py:{line}: {name}" for module, name, line in found if not is_right(module, name)]


def test_imports_go_one_way():
    assert faults(is_below) == []


def test_heavy_libraries_have_one_door():
    assert faults(is_let_in) == []


def test_what_is_imported_is_there():
    """Also inside functions, which no import of the module would find."""
    assert faults(lambda module, name: is_there(name)) == []


def test_configuration_leaves_import_nothing_of_ours():
    leaves = [module for module in MODULES if room_of(module.split("/")) == LEAVES]
    assert leaves
    assert faults(lambda module, name: name.split(".")[0] != "fedspeed", leaves) == []


def test_no_two_rooms_import_each_other():
    """The floors say so already, unless two rooms of one name were on them."""
    arrows = set()
    for module in MODULES:
        owns = [own for name, _ in imports(module) if (own := module_of(name)) is not None]
        arrows |= {(room_of(module.split("/")), room_of(own.split("/"))) for own in owns}
    assert [(a, b) for a, b in sorted(arrows) if a < b and (b, a) in arrows] == []


def test_no_modules_import_each_other_in_a_circle():
    """Nor by way of imports inside functions, or for type checkers only."""
    graph = {module: {module_of(name) for name, _ in imports(module)} - {None} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("library", LATE)
def test_what_is_imported_late_loads_what_it_is_late_for(library):
    for module in LATE[library]:
        assert library in loads(module), f"{module} loads no {library}: import it at the top, not late"


def test_what_is_on_the_list_is_imported_late_somewhere():
    used = {own for module in MODULES for own, _ in late_imports(module)}
    assert set().union(*LATE.values()) - used == set()


@pytest.mark.parametrize(
    "module", ["cli/command_line", "session/local_run", "session/dry_run", "session/rank"]
)
def test_what_starts_before_a_rank_computes_loads_no_torch(module):
    """The supervisor, a dry run, and a rank until it has met the others: `import` alone, for what functions
    import is on the list above.
    """
    assert {"torch", "transformers", "peft", "deepspeed", "mpi4py", "cryptography"} & loads(module) == set()


def is_spared(module, own):
    """Say whether a late import of a module of ours keeps away a library of the list."""
    return any(own in LATE[library] and library not in loads(module) for library in LATE)


def test_only_what_is_listed_is_imported_late():
    held = [module for module in MODULES if module.split("/")[0] not in NOT_HELD_TO_LATE]
    late = [(module, own, line) for module in held for own, line in late_imports(module)]
    found = [f"{module}.py:{line}: {own}" for module, own, line in late if not is_spared(module, own)]
    assert found == [], "import them at the top"


def test_files_are_short():
    lines = {module: len((PACKAGE / f"{module}.py").read_text().splitlines()) for module in MODULES}
    assert {module for module in MODULES if lines[module] > MAX_FILE_LINES} == set()


def test_functions_are_short():
    nodes = [(module, node) for module in MODULES for node in ast.walk(tree_of(module))]
    functions = [(m, node) for m, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = {f"{m}.py: {node.name}": node.end_lineno - node.lineno + 1 for m, node in functions}
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


def test_every_room_is_on_the_map():
    assert {room_of(module.split("/")) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("room", ["planner", "schedule"])
def test_what_decides_is_pure(room):
    """It computes; whoever calls it reads files and prints."""
    allowed = {"fedspeed", "collections", "dataclasses", "functools", "itertools", "math", "re", "typing"}
    modules = [module for module in MODULES if module.startswith(f"{room}/")]
    assert modules
    assert faults(lambda module, name: name.split(".")[0] in allowed, modules) == []

"""Rules for source files that ruff does not have. ruff checks line length, positional parameters and
docstrings, and mypy types (pyproject.toml).
"""

import ast
import re
from collections import defaultdict
from functools import cache

from tests.conftest import ROOT

FOLDERS = ("fedspeed", "benchmarks", "tests")
FILES = sorted([ROOT / "launch.py", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))])
MAX_POSITIONAL = 5
MAX_LINE = 110
GENERATED = "docs/config.md"
# Files with `type: ignore` and how often, with a comment on the reason.
IGNORED_TYPES: dict[str, int] = {}


@cache
def tree_of(path):
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


def found(is_fault):
    """Return `file:line` of every node that is a fault."""
    nodes = ((path, node) for path in FILES for node in ast.walk(tree_of(path)))
    return [f"{path.relative_to(ROOT)}:{node.lineno}" for path, node in nodes if is_fault(node)]


def is_swap(node):
    """Say whether a later value of an assignment reads what an earlier one would overwrite: `a, b = b, a`."""
    targets = [ast.unparse(target) for target in node.targets[0].elts]
    values = [{ast.unparse(part) for part in ast.walk(value)} for value in node.value.elts]
    return any(target in read for at, target in enumerate(targets) for read in values[at + 1 :])


def assigns_twice(node):
    """Say whether a statement makes more than one assignment."""
    if not isinstance(node, ast.Assign):
        return False
    if len(node.targets) > 1:
        return True
    several = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    return several and not is_swap(node)


def nests_conditions(node):
    """Say whether a conditional expression has another one in it."""
    if not isinstance(node, ast.IfExp):
        return False
    return any(isinstance(part, ast.IfExp) for part in ast.walk(node) if part is not node)


def test_a_statement_makes_one_assignment():
    assert found(assigns_twice) == []


def test_conditional_expressions_are_not_nested():
    assert found(nests_conditions) == []


def own_functions():
    """Return for each function name of this repository whether all functions of that name have `*args`."""
    takes_any = defaultdict(list)
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                takes_any[node.name].append(node.args.vararg is not None)
    return {name: all(answers) for name, answers in takes_any.items()}


def test_calls_have_few_positional_arguments():
    """Only calls of functions with `*args` may have more."""
    takes_any = own_functions()

    def is_long(node):
        if not isinstance(node, ast.Call) or len(node.args) <= MAX_POSITIONAL:
            return False
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return not takes_any.get(name, False)

    assert found(is_long) == []


def test_types_are_ignored_only_where_it_is_listed():
    counts = {}
    for path in FILES:
        lines = path.read_text().splitlines()
        if path != ROOT / "tests" / "test_page.py":
            counts[str(path.relative_to(ROOT))] = sum("# type: ignore" in line for line in lines)
    assert {path: count for path, count in counts.items() if count} == IGNORED_TYPES


def test_lines_of_scripts_and_prose_are_short():
    """Ruff reads Python alone. Tables, headings and code of Markdown pages may be longer."""
    pages = [
        *ROOT.glob("*.md"),
        *(p for name in ("docs", "fedspeed", "benchmarks") for p in (ROOT / name).rglob("*.md")),
    ]
    scripts = [
        p
        for name in ("launchers", "benchmarks", "hostfiles")
        for p in (ROOT / name).rglob("*")
        if p.is_file()
    ]
    lines = [
        (p, line)
        for p in scripts
        if p.suffix in (".sh", ".sbatch", "")
        for line in p.read_text().splitlines()
    ]
    for page in pages:
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        lines += [(page, line) for line in prose.splitlines() if not line.startswith(("|", "#"))]
    long = [f"{path.relative_to(ROOT)}: {line}" for path, line in lines if len(line) > MAX_LINE]
    assert [line for line in long if not line.startswith(GENERATED)] == []

"""What README and docs name in code marks is there: files and folders, keys of the configuration, names in
our modules and classes. Read from text.
"""

import ast
import re
from functools import cache
from typing import get_args

import pytest

from fedspeed.config.fields import fields_of
from fedspeed.config.run import RunConfig
from fedspeed.engine.capabilities import Capability
from tests.conftest import ROOT

PAGES = (
    "README.md",
    "fedspeed/routing/THREATS.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
)
KEYS = set(fields_of(RunConfig)[0]) | {"deepspeed"}
FOLDERS = ("fedspeed", "tests", "docs", "benchmarks", "ds_configs", "hostfiles", "launchers")
ROOMS = {path.name for path in (ROOT / "fedspeed").rglob("*") if path.is_dir()}
OUTPUTS = (".png", ".json", ".jsonl", ".md")  # files of a run, which are named in the product's source
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
# Not ours, or of an example: what DeepSpeed reads on a tensor, hosts, a file of Slurm's, shapes of names.
OF_OTHERS = {"param.ds_zero_partition_process_group", "gpu1.site-a.org", "gpu1.site-b.org", "slurm.conf"}
OF_OTHERS |= {
    "pytorch_model.bin",
    "fed.yaml",
    "self.config",
    "engine.forward_gradients",
    "org/model",
    "system/open_files",
}
HOLDERS = {"engine": "ClientEngine", "trainer": "Trainer"}  # what a variable of such a name holds


@cache
def sources():
    """Return the text of every module of ours by its path in the repository."""
    paths = sorted((ROOT / "fedspeed").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


@cache
def path_endings():
    """Return every path of the repository, and what is left of it behind each of its folders."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder, *(ROOT / folder).rglob("*"))]
    whole = [path.relative_to(ROOT).parts for path in (*paths, *ROOT.iterdir())]
    return {"/".join(parts[start:]) for parts in whole for start in range(len(parts))}


@cache
def names_of_ours():
    """Return (module or class, name) of everything that is defined in our modules, methods and fields too."""
    found = set()
    for place, text in sources().items():
        tree = ast.parse(text)
        holders = [(place.removesuffix(".py").rpartition("/")[2], tree)]
        holders += [(node.name, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for holder, node in holders:
            found |= {(holder, n.name) for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            stored = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)]
            found |= {(holder, getattr(n, "id", getattr(n, "attr", ""))) for n in stored}
    return found


def is_key(name):
    """Say whether a name is a key of the configuration, or a part or the inside of one."""
    parts = name.split(".")
    return bool(KEYS & {".".join(parts[:end]) for end in range(1, len(parts) + 1)})


def is_file(path):
    """Say whether a path is one of the repository, or the end of one, or of what a run writes."""
    bare = path.rstrip("/")
    if bare.startswith("runs/"):
        bare = bare.rpartition("/")[2]
    written = bare.endswith(OUTPUTS) and "/" not in bare
    if {bare, f"{bare}.py"} & path_endings():
        return True
    return written and any(f'"{bare}"' in text for text in sources().values())


def is_there(name):
    """Say whether a dotted name is a key, a file, or something that a module or a class of ours has."""
    holder, last = name.split(".")[-2:]
    return is_key(name) or is_file(name) or (HOLDERS.get(holder, holder), last) in names_of_ours()


def named_in(text):
    """Return the paths and dotted names that a page has in code marks, outside of its blocks of code."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    marked = {re.sub(r"[=(:].*", "", code) for code in re.findall(r"`([^`\s]+)`", prose)}
    paths = {code for code in marked if PATH.fullmatch(code) and "/" in code}
    within = {*FOLDERS, *ROOMS}
    ours = {path for path in paths if path.split("/")[0] in within or path.endswith((".py", ".md"))}
    return (ours | {code for code in marked if DOTTED.fullmatch(code)}) - OF_OTHERS


def new_files_of(text):
    """Return the files that a page itself tells how to make."""
    return set(re.findall(r"[Oo]ne new file, `([^`]+)`", text))


def links_of(text):
    """Return (text, target) of the links that a page has to files of the repository."""
    found = re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [(shown, target) for shown, target in found if not target.startswith("http")]


def headings_of(page):
    """Return the anchors of a page's headings, as they are made of them by GitHub."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_link(page, shown, target):
    """Say whether a link leads nowhere, or to a module that does not define the names in its text."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or (anchor and anchor not in headings_of(file)):
        return True
    if file.suffix != ".py":
        return False
    stem = file.relative_to(ROOT).as_posix().removesuffix(".py").rpartition("/")[2]
    names = [
        name for name in re.findall(r"`(\w+(?:\.\w+)?)`", shown) if not (ROOT / "fedspeed" / name).exists()
    ]
    defined = {name for holder, name in names_of_ours() if holder == stem}
    return any(name.partition(".")[0] not in {*defined, stem} for name in names if not name.endswith(".py"))


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    path = ROOT / page
    assert [link for link in links_of(path.read_text()) if broken_link(path, *link)] == []


def gone_from(text):
    """Return what a page names that is not there."""
    named = named_in(text) - new_files_of(text)
    return {name for name in named if not (is_file(name) if "/" in name else is_there(name))}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    assert gone_from((ROOT / page).read_text()) == set(), f"{page} names what is not there"


def test_needs_of_methods_are_capabilities():
    text = (ROOT / "docs/methods.md").read_text()
    named = {name for found in re.findall(r"needs = \{(\w+)\}", text) for name in found.split(", ")}
    assert named == {"forward_gradients", "perturb", "distil"} <= set(get_args(Capability))


def test_what_is_gone_is_found():
    gone = "`session/gone.py` `models/gone` `Method.gone` `train.gone=3`"
    text = f"{gone} `Method.turn` `tests/tiny.py` `models/stored` `train.lr=1e-4`"
    assert gone_from(text) == {"session/gone.py", "models/gone", "Method.gone", "train.gone"}

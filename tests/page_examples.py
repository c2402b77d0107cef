"""The examples of docs/extending.md, exactly as they are printed there: in a copy of the package, with the
new file of a section and the line that registers it.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.conftest import ROOT
from tests.limits import LIMIT_S


def section(title: str) -> str:
    """Return a section of the page, without its heading."""
    page = (ROOT / "docs" / "extending.md").read_text()
    assert page.count(f"\n## {title}\n") == 1
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def code_of(title: str) -> list[str]:
    """Return the blocks of code of a section."""
    return re.findall(r"```(?:python|text)\n(.*?)```", section(title), re.DOTALL)


def copy_with_example(folder: Path, title: str, registry: str, register: Callable[[str, str], str]) -> Path:
    """Copy the package into a folder, with a section's new file and its line; return the folder.

    Args:
        registry: the module that gets the line, below the folder.
        register: from the module's text and the line to its text with the line.
    """
    path = re.search(r"One new file, `(\S+)`:", section(title))[1]
    new_file, line = code_of(title)
    shutil.copytree(ROOT / "fedspeed", folder / "fedspeed", ignore=shutil.ignore_patterns("__pycache__"))
    assert not (folder / path).exists()
    (folder / path).write_text(new_file)
    before = (folder / registry).read_text()
    (folder / registry).write_text(register(before, line))
    added = set((folder / registry).read_text().splitlines()) - set(before.splitlines())
    assert len(added) == 1, "the one line"
    return folder


def after(opening: str) -> Callable[[str, str], str]:
    """Return how a line is registered that comes first in a list, behind the line that opens it."""

    def register(text: str, line: str) -> str:
        assert f"\n{text}".count(f"\n{opening}\n") == 1
        return text.replace(f"{opening}\n", f"{opening}\n{line}", 1)

    return register


def run_in(folder: Path, code: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run Python code in a process of its own that imports the folder's package; return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

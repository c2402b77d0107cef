"""The interface of the programming languages of code tasks: how a program is put together, compiled and run.

How programs are put together follows the published harnesses: human-eval (github.com/openai/human-eval) for
Python, and HumanEval-X of CodeGeeX (github.com/THUDM/CodeGeeX) for the others.
"""

import os
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from fedspeed.evaluation.sandbox.limits import Job


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One item of a code task.

    Attributes:
        name: such as `CPP/0`. language: name of its language.
        prompt: the program up to the body of the function. solution: the reference for what follows.
        test: the code that checks the function.
        entry_point: name of the function; empty if the tests call it themselves.
        imports: of the prompt. test_setup: beginning of the test file. Both are empty in languages whose test
            stands behind the function.
    """

    name: str
    language: str
    prompt: str
    solution: str
    test: str
    entry_point: str = ""
    imports: str = ""
    test_setup: str = ""


class Language(ABC):
    """A programming language.

    Attributes:
        name: in the registry. title: for people.
        install: what to install where something is missing.
        stop_texts: that a completion ends before. ends_with_brace: whether it ends behind the brace that
            closes the function.
        trial: a small program that needs all tools and libraries of the exercises, and prints `works`.
    """

    name: str
    title: str
    install: str
    stop_texts: tuple[str, ...] = ()
    ends_with_brace: bool = True
    trial: str

    @abstractmethod
    def source(self, exercise: Exercise, completion: str, proof: str) -> str:
        """Return the program that tests a completion, and prints the proof after all tests have passed.

        Args:
            proof: a text without quotes and backslashes that no program can guess.
        """

    @abstractmethod
    def job(self, source: str) -> Job:
        """Return how a program is compiled and run.

        Raises:
            FileNotFoundError: a tool is not installed; the argument is its name.
        """


def up_to_last_brace(completion: str) -> str:
    """Return a completion up to its last closing brace, or all of it without one."""
    end = completion.rfind("}")
    return completion[: end + 1] if end >= 0 else completion


def before_last_brace(code: str, statement: str) -> str:
    """Return code with a statement inserted before its last closing brace."""
    end = code.rindex("}")
    return f"{code[:end]}{statement}{code[end:]}"


@dataclass(frozen=True)
class Tool:
    """An installed program.

    Attributes:
        path: of its file, links resolved. folders: its installation, where that is not part of the system.
    """

    path: str
    folders: tuple[str, ...]


def tool(name: str) -> Tool:
    """Return an installed program.

    Raises:
        FileNotFoundError: it is not installed; or its installation is not in a folder of its own, so that a
            sandbox would have to show other files of the user.
    """
    path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(name)
    return installed(Path(os.path.realpath(path)))


def installed(path: Path) -> Tool:
    """Return the program of a file whose links are resolved. Raises as `tool`."""
    if Path("/usr") in path.parents:
        return Tool(str(path), ())
    prefix = path.parent.parent
    if prefix in {Path("/"), Path.home(), *Path.home().parents}:
        raise FileNotFoundError(f"{path.name} in a folder of its own, instead of {path}")
    return Tool(str(path), (str(prefix),))

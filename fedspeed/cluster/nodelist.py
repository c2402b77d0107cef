"""How schedulers write lists of hosts: Slurm's bracket lists and counts, and PBS's node file. Pure."""

import re
from collections import Counter

from fedspeed.errors import HostfileError

_BRACKET = re.compile(r"\[([^\[\]]*)\]")


def expand_hosts(nodelist: str) -> list[str]:
    """Expand Slurm's bracket notation (man scontrol, "show hostnames") to host names.

    `node[1-3,07-09],gpu2` becomes node1 node2 node3 node07 node08 node09 gpu2: zero padding is kept. A name
    may have several brackets.

    Raises:
        HostfileError: the text is not of this form, or names no host.
    """
    names: list[str] = []
    for word in _split_outside_brackets(nodelist):
        names += _expand(word, nodelist)
    if not names:
        raise HostfileError(
            f"Slurm's node list `{nodelist}` names no host; start ranks with srun or mpirun inside a job, "
            "or pass --hostfile"
        )
    return names


def expand_counts(counts: str) -> list[int]:
    """Expand the notation of SLURM_TASKS_PER_NODE to numbers: `2(x3),1` becomes [2, 2, 2, 1].

    Raises:
        HostfileError: the text is not of this form.
    """
    numbers: list[int] = []
    for word in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word.strip(), re.ASCII)
        if not match:
            raise HostfileError(
                f"Slurm's task counts `{counts}` are not of the form `2(x3),1`; pass --hostfile"
            )
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def count_lines(text: str) -> dict[str, int]:
    """Return host -> number of its lines in a PBS node file, in order of first appearance.

    The file names a host once per MPI rank.
    """
    return dict(Counter(line.strip() for line in text.splitlines() if line.strip()))


def _split_outside_brackets(nodelist: str) -> list[str]:
    return [word for word in re.split(r",(?![^\[]*\])", nodelist.strip()) if word]


def _expand(word: str, nodelist: str) -> list[str]:
    match = _BRACKET.search(word)
    if not match:
        if "[" in word or "]" in word:
            raise HostfileError(
                f"Slurm's node list `{nodelist}` has an unbalanced bracket in `{word}`; pass --hostfile"
            )
        return [word]
    names: list[str] = []
    for part in match[1].split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        first, last = (numbers[1], numbers[2] or numbers[1]) if numbers else ("", "")
        if not numbers or int(last) < int(first):
            raise HostfileError(
                f"Slurm's node list `{nodelist}` has the range `{part}`, which is not like 1-3; pass "
                "--hostfile"
            )
        for number in range(int(first), int(last) + 1):
            names += _expand(
                word[: match.start()] + str(number).zfill(len(first)) + word[match.end() :], nodelist
            )
    return names

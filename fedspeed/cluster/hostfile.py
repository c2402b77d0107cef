"""Hostfiles: `NAME slots=N` lines as DeepSpeed and Open MPI read them, and facts about hosts and clusters in
comment lines.

Facts stand in full comment lines because that is the one place where both launchers tolerate more words: Open
MPI stops at an unknown `key=value` behind a host, DeepSpeed ignores it. The grammar is written down in
docs/hostfile.md.
"""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedspeed.errors import HostfileError

DEFAULT_CLUSTER = "default"
MAX_SLOTS = 1024  # of one host

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_FACT_WORDS = ("fed-host", "fed-cluster")
# First words of a comment that look meant as a fact; other prose may say what it likes, "federated" included.
_FACT_LIKE = re.compile(r"fed[-_].*|fed[-_]?(?:host|node|cluster|group)s?:?", re.IGNORECASE)


@dataclass(frozen=True)
class Host:
    """One machine (or one logical share of it) and what is known about each of its `slots` accelerators.

    A fact that nobody stated is None. Memory is in GiB (`gpu_mem_gib` per GPU, `ram_gib` per host),
    `link_gbps` is the bandwidth to the other hosts, `nvme` a folder on a local disk. `role` tells whether the
    host carries clients, or is the server of a method that has one. `line` is where the hostfile names the
    host, 0 if no file does.
    """

    name: str
    slots: int
    cluster: str = DEFAULT_CLUSTER
    gpu: str | None = None
    gpu_mem_gib: float | None = None
    ram_gib: float | None = None
    nvme: str | None = None
    link_gbps: float | None = None
    role: Literal["client", "server"] = "client"
    line: int = 0

    @property
    def facts(self) -> tuple:
        """Everything stated about the host, so that two files can be compared; neither its slots nor its
        line.
        """
        return self.cluster, self.gpu, self.gpu_mem_gib, self.ram_gib, self.nvme, self.link_gbps, self.role


@dataclass(frozen=True)
class ClusterFacts:
    """What a `# fed-cluster` line says; the hardware facts are the defaults of the cluster's hosts.

    `trust` tells whether the clients of the cluster share one trust domain (they may then hold each other's
    adapters).
    """

    name: str
    trust: Literal["separate", "shared"] = "separate"
    gpu: str | None = None
    gpu_mem_gib: float | None = None
    ram_gib: float | None = None
    nvme: str | None = None
    link_gbps: float | None = None
    line: int = 0


@dataclass(frozen=True)
class Hostfile:
    """A whole file: hosts in file order (which is the order of the world ranks) and the declared clusters."""

    path: str
    hosts: tuple[Host, ...]
    clusters: tuple[ClusterFacts, ...] = ()

    @property
    def slots(self) -> int:
        return sum(host.slots for host in self.hosts)

    def host(self, name: str) -> Host | None:
        return next((host for host in self.hosts if host.name == name), None)

    def cluster(self, name: str) -> ClusterFacts:
        """Facts of a cluster; a cluster without a line of its own has none."""
        return next((facts for facts in self.clusters if facts.name == name), ClusterFacts(name))


def read(path: Path | str) -> Hostfile:
    """Reads and checks a hostfile. Raises HostfileError with every problem of the file."""
    path = Path(path)
    try:
        # newline="" keeps carriage returns visible: Open MPI takes them for part of the word before.
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        raise HostfileError(
            f"{path}: there is no such hostfile; check the path, or write one line `NAME slots=N` per host"
        ) from None
    except IsADirectoryError:
        raise HostfileError(f"{path}: is a folder; name the hostfile inside it") from None
    except UnicodeDecodeError as error:
        raise HostfileError(
            f"{path}: is not a text file ({error.reason} at byte {error.start}); a hostfile is plain text"
        ) from None
    except OSError as error:
        raise HostfileError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    return parse(text, path)


def parse(text: str, path: Path | str) -> Hostfile:
    """Parses the text of a hostfile; `path` only serves the messages.

    Raises HostfileError: all problems in one message, each as file:line, value and remedy.
    """
    return _Parser(str(path)).parse(text)


class _Parser:
    """Two passes: lines are taken apart and judged singly, then facts are held against the hosts they speak
    of.
    """

    def __init__(self, path: str):
        self.path = path
        self.problems: list[tuple[int, str]] = []
        self.hosts: dict[str, Host] = {}
        self.malformed: set[str] = set()
        self.facts: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {word: {} for word in _FACT_WORDS}

    def parse(self, text: str) -> Hostfile:
        for number, line in enumerate(text.split("\n"), start=1):
            self._line(number, line)
        if not self.hosts and not self.problems:
            self._refuse(0, "names no host; write one line `NAME slots=N` per host")
        hosts, clusters = self._with_facts()
        if self.problems:
            lines = [
                f"{self.path}:{number}: {text}" if number else f"{self.path}: {text}"
                for number, text in sorted(self.problems)
            ]
            head = "" if len(lines) == 1 else f"{len(lines)} problems in the hostfile:\n  - "
            raise HostfileError(head + "\n  - ".join(lines))
        return Hostfile(self.path, hosts, clusters)

    def _refuse(self, number: int, text: str) -> None:
        self.problems.append((number, text))

    def _line(self, number: int, line: str) -> None:
        if line.endswith("\r"):
            self._refuse(
                number,
                "the line ends with a carriage return, which Open MPI refuses; save the file with Unix line "
                "ends",
            )
        line = line.strip()
        if line.startswith("#"):
            self._comment(number, line)
        elif line:
            self._host(number, line)

    def _host(self, number: int, line: str) -> None:
        line, _, comment = line.partition("#")
        if comment and _FACT_LIKE.fullmatch(comment.split()[0] if comment.split() else ""):
            self._refuse(
                number,
                f"`#{comment}` stands behind a host; facts need a line of their own, `# fed-host NAME "
                "key=value`",
            )
        name, *words = line.split()
        if not _NAME.fullmatch(name):
            self._refuse(number, f"`{name}` is no host name; use letters, digits, `.`, `-` and `_`")
            return
        if name in self.hosts or name in self.malformed:
            first = f" (line {self.hosts[name].line})" if name in self.hosts else ""
            self._refuse(
                number, f"host {name} is named twice{first}; keep one line and add the slots up there"
            )
            return
        slots = self._slots(number, name, words)
        if slots is None:
            self.malformed.add(name)
        else:
            self.hosts[name] = Host(name, slots, line=number)

    def _slots(self, number: int, name: str, words: list[str]) -> int | None:
        """The number behind `slots=`, or None after the problem has been noted."""
        wish = f"write `{name} slots=N` with the number of ranks the host may run"
        if not words or not words[0].startswith("slots="):
            found = f"`{' '.join(words)}` stands where" if words else "there is nothing where"
            self._refuse(number, f"{found} the slots of host {name} belong; {wish}")
            return None
        if len(words) > 1:
            self._refuse(
                number,
                f"`{' '.join(words[1:])}` behind the slots of host {name} would stop Open MPI; move facts "
                "to a line "
                f"`# fed-host {name} key=value`",
            )
            return None
        value = words[0].removeprefix("slots=")
        if not re.fullmatch(r"[+-]?\d+", value, re.ASCII):
            self._refuse(number, f"slots=`{value}` of host {name} is not a whole number; {wish}")
            return None
        if len(value) > 9 or int(value) > MAX_SLOTS:
            self._refuse(
                number,
                f"slots={value if len(value) < 20 else value[:17] + '...'} of host {name} are more than one "
                f"host has; {wish}, "
                f"at most {MAX_SLOTS}",
            )
            return None
        if int(value) < 1:
            self._refuse(number, f"slots={value} of host {name} gives it no rank; {wish}, or delete the line")
            return None
        if not value.isdigit():
            self._refuse(
                number, f"slots={value} of host {name} is refused by DeepSpeed; write slots={int(value)}"
            )
            return None
        return int(value)

    def _comment(self, number: int, line: str) -> None:
        words = line.lstrip("#").split()
        if not words or not _FACT_LIKE.fullmatch(words[0]):
            return
        word = words[0]
        if word not in _FACT_WORDS or not re.match(r"#\s+fed", line):
            meant = "fed-cluster" if re.search("cluster|group", word, re.IGNORECASE) else "fed-host"
            self._refuse(
                number,
                f"`{line.split(word)[0]}{word}` is not a fact line; write `# {meant} NAME key=value ...`, "
                "or start the comment with another word",
            )
            return
        if len(words) < 2 or not _NAME.fullmatch(words[1]):
            self._refuse(
                number, f"`# {word}` lacks the name it speaks of; write `# {word} NAME key=value ...`"
            )
            return
        name = words[1]
        pairs = words[2:]
        if name in self.facts[word]:
            self._refuse(
                number,
                f"facts of {word.removeprefix('fed-')} {name} are given twice (line "
                f"{self.facts[word][name][0]}); "
                "merge the two lines",
            )
            return
        self.facts[word][name] = (number, self._pairs(number, word, name, pairs))

    def _pairs(self, number: int, word: str, name: str, pairs: list[str]) -> dict[str, Any]:
        readers, others = (
            (_HOST_FACTS, _CLUSTER_FACTS) if word == "fed-host" else (_CLUSTER_FACTS, _HOST_FACTS)
        )
        known = {}
        if not pairs:
            self._refuse(
                number,
                f"`# {word} {name}` states no fact; add key=value with keys {', '.join(readers)}, or delete "
                "the line",
            )
        if broken := [pair for pair in pairs if not re.fullmatch("[^=]+=.+", pair)]:
            self._refuse(
                number,
                f"`{' '.join(broken)}` is not key=value (no blanks around the `=` or inside the value)",
            )
        for key, _, value in (pair.partition("=") for pair in pairs if pair not in broken):
            if key not in readers:
                near = difflib.get_close_matches(key, readers, n=1)
                hint = (
                    f"it is a fact of a `# {'fed-cluster' if word == 'fed-host' else 'fed-host'}` line"
                    if key in others
                    else f"did you mean `{near[0]}`?"
                    if near
                    else f"known are {', '.join(readers)}"
                )
                self._refuse(number, f"unknown fact `{key}` of {word.removeprefix('fed-')} {name}; {hint}")
            elif key in known:
                self._refuse(number, f"fact `{key}` of {name} is given twice in this line; keep one")
            else:
                try:
                    known[key] = readers[key](value)
                except ValueError as error:
                    self._refuse(number, f"{key}=`{value}` of {name} {error}")
        return known

    def _with_facts(self) -> tuple[tuple[Host, ...], tuple[ClusterFacts, ...]]:
        host_facts = self.facts["fed-host"]
        cluster_facts = self.facts["fed-cluster"]
        for name, (number, _) in host_facts.items():
            if name not in self.hosts and name not in self.malformed:
                near = difflib.get_close_matches(name, self.hosts, n=1)
                hint = f"did you mean {near[0]}?" if near else f"add `{name} slots=N` or delete the line"
                self._refuse(number, f"fact for host {name}, which the file does not name; {hint}")
        hosts = []
        for host in self.hosts.values():
            own_line, own = host_facts.get(host.name, (host.line, {}))
            cluster = own.get("cluster", DEFAULT_CLUSTER)
            cluster_line, shared = cluster_facts.get(cluster, (0, {}))
            if "gpu" in own and "gpu" in shared and own["gpu"] != shared["gpu"]:
                self._refuse(
                    own_line,
                    f"gpu={own['gpu']} of host {host.name} contradicts gpu={shared['gpu']} of its cluster "
                    f"{cluster} "
                    f"(line {cluster_line}); give the host another cluster, or correct one of the two",
                )
            defaults = {key: value for key, value in shared.items() if key != "trust"}
            hosts.append(replace(host, **{**defaults, **own}))
        servers = [host for host in hosts if host.role == "server"]
        for other in servers[1:]:
            self._refuse(
                host_facts[other.name][0],
                f"role=server of {other.name}: {servers[0].name} is the server already; a federation has one",
            )
        # A host line that could not be read may be the very host of that cluster: one mistake, one message.
        lost = {host_facts.get(name, (0, {}))[1].get("cluster", DEFAULT_CLUSTER) for name in self.malformed}
        used = {host.cluster for host in hosts} | lost
        for name, (number, _) in cluster_facts.items():
            if name not in used:
                near = difflib.get_close_matches(name, used, n=1)
                hint = f"did you mean {near[0]}? Otherwise " if near else ""
                self._refuse(
                    number,
                    f"no host belongs to cluster {name}; {hint}write `# fed-host NAME cluster={name}` for "
                    "its hosts, "
                    "or delete the line",
                )
        return tuple(hosts), tuple(
            ClusterFacts(name, line=number, **facts) for name, (number, facts) in cluster_facts.items()
        )


def _word(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("is no plain word; use letters, digits, `.`, `-` and `_`")
    return text


def _folder(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("is not an absolute path; ranks do not share a working folder on every host")
    return text


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is not a number; write it without a unit") from None
    if not math.isfinite(value) or value <= 0:
        raise ValueError("must be above 0")
    return value


def _trust(text: str) -> str:
    if text not in ("separate", "shared"):
        raise ValueError("must be `separate` or `shared`")
    return text


def _role(text: str) -> str:
    if text not in ("client", "server"):
        raise ValueError("must be `client` or `server`")
    return text


_HARDWARE: dict[str, Callable[[str], Any]] = {
    "gpu": _word,
    "gpu_mem_gib": _positive,
    "ram_gib": _positive,
    "nvme": _folder,
    "link_gbps": _positive,
}
_HOST_FACTS: dict[str, Callable[[str], Any]] = {"cluster": _word, "role": _role, **_HARDWARE}
_CLUSTER_FACTS: dict[str, Callable[[str], Any]] = {**_HARDWARE, "trust": _trust}

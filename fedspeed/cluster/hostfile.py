"""Hostfiles: `NAME slots=N` lines as DeepSpeed and Open MPI read them, and facts in comment lines.

Facts are written in full comment lines because both launchers ignore those: Open MPI refuses an unknown
`key=value` behind a host, and DeepSpeed ignores it. docs/hostfile.md describes the grammar.
"""

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedspeed.cluster.hostfile_facts import CLUSTER_FACTS, HOST_FACTS, NAME, key_hint
from fedspeed.errors import HostfileError

DEFAULT_CLUSTER = "default"
# Per host.
MAX_SLOTS = 1024

_KEYWORDS = ("fed-host", "fed-cluster")
# First words of a comment that look like a misspelt fact line. Other comments are free text.
_FACT_LIKE = re.compile(r"fed[-_].*|fed[-_]?(?:host|node|cluster|group)s?:?", re.IGNORECASE)


@dataclass(frozen=True)
class Host:
    """A machine, or one logical share of it, with facts about each of its `slots` accelerators.

    A fact that nobody stated is None.

    Attributes:
        cluster: name of its cluster.
        gpu: name of its GPUs.
        gpu_mem_gib: memory of each GPU.
        ram_gib: memory of the host.
        nvme: a folder on a local disk.
        link_gbps: bandwidth to the other hosts.
        role: whether the host carries clients, or is the server of a method that has one.
        line: where the hostfile names the host; 0 if no file does.
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
        """Return all facts, to compare two hosts; neither slots nor line are facts."""
        return self.cluster, self.gpu, self.gpu_mem_gib, self.ram_gib, self.nvme, self.link_gbps, self.role


@dataclass(frozen=True)
class ClusterFacts:
    """The facts of a `# fed-cluster` line; hardware facts are defaults for the cluster's hosts.

    `trust` says whether the clients of the cluster share one trust domain, in which they may hold each
    other's adapters.
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
    """A parsed file: hosts in file order, which is the order of the world ranks, and the declared
    clusters.
    """

    path: str
    hosts: tuple[Host, ...]
    clusters: tuple[ClusterFacts, ...] = ()

    @property
    def slots(self) -> int:
        """Return the number of slots of all hosts."""
        return sum(host.slots for host in self.hosts)

    def host(self, name: str) -> Host | None:
        """Return the host of that name; None without one."""
        return next((host for host in self.hosts if host.name == name), None)

    def cluster(self, name: str) -> ClusterFacts:
        """Return the facts of a cluster; all are None or default if the file has no line for it."""
        return next((facts for facts in self.clusters if facts.name == name), ClusterFacts(name))


def read(path: Path | str) -> Hostfile:
    """Read and check a hostfile.

    Raises:
        HostfileError: with every problem of the file.
    """
    path = Path(path)
    try:
        # newline="" keeps carriage returns, which Open MPI takes for part of the word before.
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
    """Parse the text of a hostfile.

    Args:
        path: of the file, for messages.

    Raises:
        HostfileError: all problems in one message, each with file, line, value and remedy.
    """
    return _Parser(str(path)).parse(text)


class _Parser:
    """Parses lines one by one, then checks facts against the hosts that they name; collects all problems."""

    def __init__(self, path: str):
        self.path = path
        self.problems: list[tuple[int, str]] = []
        self.hosts: dict[str, Host] = {}
        self.malformed: set[str] = set()
        self.facts: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {word: {} for word in _KEYWORDS}

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
        if not NAME.fullmatch(name):
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
        """Return the number behind `slots=`; None if a problem was found."""
        wish = f"write `{name} slots=N` with the number of ranks the host may run"
        if not words or not words[0].startswith("slots="):
            problem = f"`{' '.join(words)}` stands where" if words else "there is nothing where"
            self._refuse(number, f"{problem} the slots of host {name} belong; {wish}")
            return None
        if len(words) > 1:
            self._refuse(
                number,
                f"`{' '.join(words[1:])}` behind the slots of host {name} would stop Open MPI; move facts "
                f"to a line `# fed-host {name} key=value`",
            )
            return None
        value = words[0].removeprefix("slots=")
        if not re.fullmatch(r"[+-]?\d+", value, re.ASCII):
            self._refuse(number, f"slots=`{value}` of host {name} is not a whole number; {wish}")
            return None
        if len(value) > 9 or int(value) > MAX_SLOTS:
            shown = value if len(value) < 20 else value[:17] + "..."
            self._refuse(
                number,
                f"slots={shown} of host {name} are more than one host has; {wish}, at most {MAX_SLOTS}",
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
        if word not in _KEYWORDS or not re.match(r"#\s+fed", line):
            meant = "fed-cluster" if re.search("cluster|group", word, re.IGNORECASE) else "fed-host"
            self._refuse(
                number,
                f"`{line.split(word)[0]}{word}` is not a fact line; write `# {meant} NAME key=value ...`, "
                "or start the comment with another word",
            )
            return
        if len(words) < 2 or not NAME.fullmatch(words[1]):
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
                f"{self.facts[word][name][0]}); merge the two lines",
            )
            return
        self.facts[word][name] = (number, self._pairs(number, word, name, pairs))

    def _pairs(self, number: int, word: str, name: str, pairs: list[str]) -> dict[str, Any]:
        """Return the facts of a line, given as key=value words."""
        readers = HOST_FACTS if word == "fed-host" else CLUSTER_FACTS
        known: dict[str, Any] = {}
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
                hint = key_hint(word, key)
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
        """Return hosts and clusters with their facts, after checking that the facts' subjects exist."""
        host_facts = self.facts["fed-host"]
        cluster_facts = self.facts["fed-cluster"]
        for name, (number, _) in host_facts.items():
            if name not in self.hosts and name not in self.malformed:
                near = difflib.get_close_matches(name, self.hosts, n=1)
                hint = f"did you mean {near[0]}?" if near else f"add `{name} slots=N` or delete the line"
                self._refuse(number, f"fact for host {name}, which the file does not name; {hint}")
        hosts = tuple(self._host_with_facts(host) for host in self.hosts.values())
        servers = [host for host in hosts if host.role == "server"]
        for other in servers[1:]:
            self._refuse(
                host_facts[other.name][0],
                f"role=server of {other.name}: {servers[0].name} is the server already; a federation has one",
            )
        self._check_clusters({host.cluster for host in hosts})
        clusters = (ClusterFacts(name, line=line, **facts) for name, (line, facts) in cluster_facts.items())
        return hosts, tuple(clusters)

    def _host_with_facts(self, host: Host) -> Host:
        """Return a host with its facts, and those of its cluster where it states none."""
        line, stated = self.facts["fed-host"].get(host.name, (host.line, {}))
        cluster = stated.get("cluster", DEFAULT_CLUSTER)
        cluster_line, shared = self.facts["fed-cluster"].get(cluster, (0, {}))
        if "gpu" in stated and "gpu" in shared and stated["gpu"] != shared["gpu"]:
            self._refuse(
                line,
                f"gpu={stated['gpu']} of host {host.name} contradicts gpu={shared['gpu']} of its cluster "
                f"{cluster} (line {cluster_line}); give the host another cluster, or correct one of the two",
            )
        defaults = {key: value for key, value in shared.items() if key != "trust"}
        return replace(host, **{**defaults, **stated})

    def _check_clusters(self, used: set[str]) -> None:
        """Check that every declared cluster has a host.

        A host line that could not be parsed may belong to such a cluster, which is then not reported too.
        """
        for name in self.malformed:
            _, stated = self.facts["fed-host"].get(name, (0, {}))
            used.add(stated.get("cluster", DEFAULT_CLUSTER))
        for name, (number, _) in self.facts["fed-cluster"].items():
            if name not in used:
                near = difflib.get_close_matches(name, used, n=1)
                hint = f"did you mean {near[0]}? Otherwise " if near else ""
                self._refuse(
                    number,
                    f"no host belongs to cluster {name}; {hint}write `# fed-host NAME cluster={name}` for "
                    "its hosts, or delete the line",
                )

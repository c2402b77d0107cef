"""Hostfiles that may describe a job although nobody named them: those in `hostfiles/`, and DeepSpeed's
default.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedspeed.cluster.hostfile import Host, Hostfile, read
from fedspeed.cluster.hostnames import matching_hosts
from fedspeed.errors import HostfileError

HOSTFILE_VARIABLE = "FEDSPEED_HOSTFILE"
# DeepSpeed reads this file when it is given no hostfile.
_DEEPSPEED_DEFAULT = Path("/job/hostfile")

# The hosts of a job in the order of their ranks, and the hostfile that states their facts, if there is one.
Layout = tuple[Hostfile | None, tuple[Host, ...]]
FileLayout = tuple[Hostfile, tuple[Host, ...]]


def requested_hostfile(argument: Path | None, env: Mapping[str, str], cwd: Path) -> Path | None:
    """Return the path given by --hostfile, else by FEDSPEED_HOSTFILE, relative to the working folder."""
    name = argument or env.get(HOSTFILE_VARIABLE)
    return cwd / name if name else None


def readable_hostfiles(cwd: Path) -> tuple[list[Hostfile], list[str]]:
    """Return the hostfiles that can be read, and why each of the others cannot.

    A broken file is no error: the job may need another one.
    """
    folder = cwd / "hostfiles"
    paths = []
    if folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if _DEEPSPEED_DEFAULT.is_file():
        paths.append(_DEEPSPEED_DEFAULT)
    files = []
    broken = []
    for path in paths:
        try:
            files.append(read(path))
        except HostfileError as error:
            broken.append(str(error).splitlines()[-1].removeprefix("  - "))
    return files, broken


def select_hosts(file: Hostfile, slots_by_host: Mapping[str, int]) -> tuple[Host, ...] | None:
    """Return those hosts of a file that a launcher uses, with as many slots as it uses.

    DeepSpeed selects with --include, --exclude and --num_nodes. None: the file lacks a host, or slots of one.
    """
    selected = []
    for name, slots in slots_by_host.items():
        host = file.host(name)
        if host is None or host.slots < slots:
            return None
        selected.append(replace(host, slots=slots))
    return tuple(selected)


def add_facts(hosts: tuple[Host, ...], cwd: Path) -> Layout:
    """Return the same hosts and slots with the facts of a hostfile that names them all, if there is one.

    Raises:
        HostfileError: files state different facts, or the only fitting file has several hosts that a host's
            name may mean.
    """
    layouts: list[FileLayout] = []
    ambiguities = []
    for file in readable_hostfiles(cwd)[0]:
        try:
            described = [_find_described(file, host.name) for host in hosts]
        except HostfileError as error:
            ambiguities.append(error)
            continue
        known = [host for host in described if host is not None]
        if len(known) == len(hosts):
            pairs = zip(known, hosts, strict=True)
            layouts.append((file, tuple(replace(k, name=h.name, slots=h.slots) for k, h in pairs)))
    if ambiguities and not layouts:
        raise ambiguities[0]
    return only_layout(layouts) or (None, hosts)


def only_layout(layouts: Sequence[FileLayout]) -> FileLayout | None:
    """Return the first of several layouts with equal facts; None if there is no layout.

    Raises:
        HostfileError: the files state different facts.
    """
    by_content: dict[tuple, FileLayout] = {}
    for file, hosts in layouts:
        content = tuple((h.name, h.slots, h.facts, file.cluster(h.cluster).trust) for h in hosts)
        by_content.setdefault(content, (file, hosts))
    if len(by_content) > 1:
        files = ", ".join(file.path for file, _ in by_content.values())
        raise HostfileError(
            f"{files}: all name the hosts of this job, but state different facts about them; add "
            f"`--hostfile FILE` behind launch.py or set {HOSTFILE_VARIABLE}"
        )
    return layouts[0] if layouts else None


def hosts_text(hosts: Sequence[Host]) -> str:
    """Return hosts and their slots as a message shows them: `alpha slots=2, beta slots=2`."""
    return ", ".join(f"{host.name} slots={host.slots}" for host in hosts)


def searched_text(files: Sequence[Hostfile], broken: Sequence[str]) -> str:
    """Return the lines of a message that list the files which were considered; empty if there were none."""
    lines = [f"{file.path}: {hosts_text(file.hosts)}" for file in files]
    lines += [f"not readable: {reason}" for reason in broken]
    return "".join(f"\n  - {line}" for line in ["looked at:", *lines]) if lines else ""


def _find_described(file: Hostfile, name: str) -> Host | None:
    """Return the host of a file with exactly this name, else the one that the name is short for.

    Raises:
        HostfileError: the name is short for several hosts, about which the file states different facts.
    """
    matches = matching_hosts(file.hosts, name)
    if len(matches) > 1:
        # The name service may take seconds to answer, so it is asked only where names alone do not decide.
        matches = matching_hosts(matches, socket.getfqdn(name))
    if len({(host.facts, file.cluster(host.cluster).trust) for host in matches}) > 1:
        raise HostfileError(
            f"{file.path}: host {name} of this job may be {' or '.join(host.name for host in matches)}, "
            "about which the file states different facts; add `--hostfile FILE` behind launch.py or set "
            f"{HOSTFILE_VARIABLE}, with the hosts of this job alone"
        )
    return matches[0] if matches else None

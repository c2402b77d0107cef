"""Which hosts, with how many slots, carry the ranks of this job: every clue there is, held against the
hostfiles at hand.

No launcher tells its ranks which hostfile it was given. DeepSpeed's per-host launcher carries the resolved
hosts on its own command line, mpirun the file's path (on the host where it was started), schedulers name
hosts in the environment. A file is accepted only if it does not contradict what this rank knows of itself;
`rendezvous.meet` then compares the answers of all ranks.
"""

import base64
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from fedspeed.cluster import nodelist
from fedspeed.cluster.hostfile import Host, Hostfile, read
from fedspeed.cluster.hostnames import find_host, is_same_host, matching_hosts
from fedspeed.cluster.ranks import RankIdentity
from fedspeed.errors import HostfileError

HOSTFILE_VARIABLE = "FEDSPEED_HOSTFILE"
# Where DeepSpeed looks when it is given no hostfile.
_DEEPSPEED_DEFAULT = Path("/job/hostfile")
_MPIRUNS = {"mpirun", "mpiexec", "prterun", "prun", "orterun", "mpiexec.hydra"}
_HOSTFILE_OPTIONS = {
    "deepspeed": ("-H", "--hostfile"),
    "openmpi": ("--hostfile", "-hostfile", "--machinefile", "-machinefile"),
    "mpi": ("-f", "--hostfile", "-hostfile", "-machinefile"),
}

Layout = tuple[Hostfile | None, tuple[Host, ...]]


@dataclass(frozen=True)
class Clues:
    """What `find` may look at. `cmdlines` are the ancestors' command lines, parent first; `named` is a
    hostfile the user named.
    """

    identity: RankIdentity
    env: Mapping[str, str]
    cmdlines: Sequence[Sequence[str]]
    named: Path | None
    cwd: Path
    hostname: str


def find(clues: Clues, world_info: dict[str, int] | None) -> Layout:
    """The job's hosts in the order of their ranks, and the hostfile that their facts come from, if one does.

    Raises:
        HostfileError: no source answers, two sources disagree, or the one that was named does not fit.
    """
    if clues.identity.kind == "deepspeed":
        assert world_info is not None, "a rank counts as DeepSpeed's only if the world info was found"
        return _from_world_info(clues, world_info)
    if clues.named:
        return _logical(read(clues.named), clues.identity.world_size)
    if clues.identity.kind == "local":
        return None, (Host("localhost", clues.identity.world_size),)
    return _from_mpirun(clues) or _from_this_machine(clues) or _from_scheduler(clues) or _from_shelf(clues)


def world_info_of(cmdlines: Sequence[Sequence[str]]) -> dict[str, int] | None:
    """Host -> number of ranks from the nearest ancestor that carries DeepSpeed's --world_info, or None."""
    for words in cmdlines:
        for word in words:
            if word.startswith("--world_info="):
                return _decode(word.removeprefix("--world_info="))
    return None


def named_hostfile(argument: Path | None, env: Mapping[str, str], cwd: Path) -> Path | None:
    """The file named by --hostfile, else by the variable, resolved against the working folder."""
    name = argument or env.get(HOSTFILE_VARIABLE)
    return cwd / name if name else None


def host_of_rank(hosts: Sequence[Host], world_rank: int) -> tuple[Host, int]:
    """The host of a world rank and the slot there, ranks being numbered host by host."""
    for host in hosts:
        if world_rank < host.slots:
            return host, world_rank
        world_rank -= host.slots
    raise IndexError(world_rank)


def _decode(text: str) -> dict[str, int]:
    try:
        world = json.loads(base64.urlsafe_b64decode(text))
        return {str(host): len(slots) for host, slots in world.items()}
    except (ValueError, AttributeError, TypeError):
        raise HostfileError(
            f"--world_info={text} on the DeepSpeed launcher's command line is not understood; name the "
            "hosts with "
            "`launch.py --hostfile FILE`"
        ) from None


# ----------------------------------------------------------------------------------------------------
# DeepSpeed's own launchers


def _from_world_info(clues: Clues, sizes: dict[str, int]) -> Layout:
    world = ", ".join(f"{host} slots={slots}" for host, slots in sizes.items())
    if sum(sizes.values()) != clues.identity.world_size:
        raise HostfileError(
            f"the DeepSpeed launcher started {sum(sizes.values())} ranks ({world}), but WORLD_SIZE="
            f"{clues.identity.world_size}; do not set WORLD_SIZE by hand"
        )
    named = clues.named or _launcher_hostfile(clues)
    if named:
        file = read(named)
        hosts = _selected(file, sizes)
        if hosts is None and len(sizes) == 1 and file.slots == clues.identity.world_size:
            return file, file.hosts
        if hosts is None:
            raise HostfileError(
                f"{file.path}: does not describe this job: DeepSpeed runs on {world}, the file has "
                f"{_listed(file.hosts)}; "
                "give both the same file"
            )
        return file, hosts
    if list(sizes) == ["localhost"]:
        return None, (Host("localhost", sizes["localhost"]),)
    files, broken = _shelf(clues.cwd)
    fitting = [(file, hosts) for file in files if (hosts := _selected(file, sizes))]
    equal = [
        (file, hosts)
        for file, hosts in fitting
        if len(file.hosts) == len(hosts) and file.slots == clues.identity.world_size
    ]
    found = _unambiguous(equal or fitting)
    if found:
        return found
    if len(sizes) == 1:
        return None, tuple(Host(host, slots) for host, slots in sizes.items())
    raise HostfileError(
        f"DeepSpeed runs on {world}, but does not tell which hostfile that came from, and no file in "
        f"{clues.cwd / 'hostfiles'} has these hosts and slots; add `--hostfile FILE` behind launch.py or set "
        f"{HOSTFILE_VARIABLE}{_looked_at(files, broken)}"
    )


def _selected(file: Hostfile, sizes: Mapping[str, int]) -> tuple[Host, ...] | None:
    """The file's hosts that the launcher uses, with as many slots as it uses (--include, --exclude,
    --num_nodes), else None.
    """
    hosts = [file.host(name) for name in sizes]
    if any(host is None or host.slots < slots for host, slots in zip(hosts, sizes.values(), strict=True)):
        return None
    return tuple(replace(host, slots=slots) for host, slots in zip(hosts, sizes.values(), strict=True))


# ---------------------------------------------------------------------------------------------------- MPI,
# Slurm, PBS, torchrun


def _logical(file: Hostfile, world_size: int) -> Layout:
    """A file that the user named is the layout, whatever machines the ranks run on: ten hosts may be emulated
    on one.
    """
    if file.slots != world_size:
        raise HostfileError(
            f"{file.path}: offers {file.slots} slots, but the launcher started {world_size} ranks; start "
            "exactly "
            f"{file.slots} (mpirun -n {file.slots}), or name a hostfile with {world_size} slots"
        )
    return file, file.hosts


def _from_mpirun(clues: Clues) -> Layout | None:
    """The hostfile on mpirun's command line, visible to the ranks on the machine where mpirun was started."""
    path = _launcher_hostfile(clues)
    if path is None or str(path) == clues.env.get("PBS_NODEFILE"):
        return None
    file = read(path)
    identity = clues.identity
    if identity.all_local and file.slots != identity.world_size:
        return None
    hosts = _filled(file.hosts, identity.world_size)
    if hosts is None:
        raise HostfileError(
            f"{file.path}: offers {file.slots} slots, but mpirun started {identity.world_size} ranks; start "
            "at most "
            f"{file.slots}, or raise the slots in the file"
        )
    if problem := _contradiction(hosts, clues):
        raise HostfileError(
            f"{file.path}: {problem}; let ranks be numbered host by host (mpirun --map-by slot)"
        )
    return file, hosts


def _from_this_machine(clues: Clues) -> Layout | None:
    if not clues.identity.all_local:
        return None
    return _with_facts((Host(clues.hostname, clues.identity.world_size),), clues)


def _from_scheduler(clues: Clues) -> Layout | None:
    identity = clues.identity
    env = clues.env
    if identity.kind == "slurm":
        names = nodelist.expand_hosts(env.get("SLURM_STEP_NODELIST", ""))
        counts = env.get("SLURM_STEP_TASKS_PER_NODE", "")
        hosts = _paired(names, nodelist.expand_counts(counts))
        if hosts is None or (problem := _contradiction(hosts, clues)):
            detail = problem if hosts else f"{len(names)} hosts, but SLURM_STEP_TASKS_PER_NODE={counts}"
            raise HostfileError(
                f"Slurm's step on {env.get('SLURM_STEP_NODELIST')}: {detail}; start with `srun "
                "--distribution=block`, "
                "or pass --hostfile"
            )
        return _with_facts(hosts, clues)
    if "SLURM_JOB_NODELIST" in env:
        attempts = _slurm_job_layouts(nodelist.expand_hosts(env["SLURM_JOB_NODELIST"]), clues)
    elif "PBS_NODEFILE" in env and (nodefile := Path(env["PBS_NODEFILE"])).is_file():
        counts = nodelist.count_lines(nodefile.read_text(encoding="utf-8"))
        attempts = [_paired(list(counts), list(counts.values()))]
    else:
        return None
    filled = [hosts for attempt in attempts if attempt and (hosts := _filled(attempt, identity.world_size))]
    fitting = [hosts for hosts in filled if not _contradiction(hosts, clues)]
    return _with_facts(fitting[0], clues) if fitting else None


def _slurm_job_layouts(names: list[str], clues: Clues) -> list[tuple[Host, ...] | None]:
    """Guesses for an mpirun (or torchrun) inside a Slurm job, best first.

    On the head node SLURM_TASKS_PER_NODE speaks of the job. Elsewhere it speaks of the step that started
    mpirun's daemon, and equal
    slots are assumed: the ranks before this machine's, divided by the machines before it.
    """
    identity = clues.identity
    env = clues.env
    layouts = []
    if "SLURM_STEP_ID" not in env and "SLURM_TASKS_PER_NODE" in env:
        layouts.append(_paired(names, nodelist.expand_counts(env["SLURM_TASKS_PER_NODE"])))
    here = find_host([Host(name, 1) for name in names], clues.hostname)
    if here and identity.local_size is not None:
        index = names.index(here.name)
        before = identity.world_rank - identity.local_rank
        slots = before // index if index else identity.local_size
        if slots >= 1:
            layouts.append(_paired(names, [slots] * len(names)))
    return layouts


def _from_shelf(clues: Clues) -> Layout:
    """Ranks of mpirun away from the machine where it was started: only the files at hand and what this rank
    knows of itself.
    """
    identity = clues.identity
    files, broken = _shelf(clues.cwd)
    found = _unambiguous([
        (file, file.hosts)
        for file in files
        if file.slots == identity.world_size
        and not _contradiction(file.hosts, clues)
        and is_same_host(host_of_rank(file.hosts, identity.world_rank)[0].name, clues.hostname)
    ])
    if found:
        return found
    raise HostfileError(
        f"{identity.world_size} ranks run on several hosts (this is rank {identity.world_rank} on "
        f"{clues.hostname}), "
        f"and nothing tells which; add `--hostfile FILE` behind launch.py, with {identity.world_size} slots "
        "in the order "
        f"of the ranks, or set {HOSTFILE_VARIABLE}{_looked_at(files, broken)}"
    )


def _contradiction(hosts: Sequence[Host], clues: Clues) -> str | None:
    """What in this layout cannot be, given what this rank knows of itself. None if it can.

    Ranks that all run on one machine may be laid out over any hosts; that is how a cluster is emulated.
    """
    identity = clues.identity
    if identity.all_local:
        return None
    host, slot = host_of_rank(hosts, identity.world_rank)
    actual = find_host(hosts, clues.hostname)
    if actual and actual != host:
        return f"rank {identity.world_rank} runs on {actual.name}, but would belong to {host.name}"
    if identity.local_rank != slot or (identity.local_size is not None and identity.local_size != host.slots):
        return (
            f"rank {identity.world_rank} is local rank {identity.local_rank} of "
            f"{identity.local_size or '?'} on {clues.hostname}, but "
            f"would be number {slot} of {host.slots} on {host.name}"
        )
    return None


def _filled(hosts: Sequence[Host], world_size: int) -> tuple[Host, ...] | None:
    """The first slots of `hosts` for `world_size` ranks, as mpirun fills them by slot; None if there are too
    few.
    """
    filled = []
    for host in hosts:
        if world_size:
            filled.append(replace(host, slots=min(host.slots, world_size)))
            world_size -= filled[-1].slots
    return None if world_size else tuple(filled)


def _paired(names: list[str], counts: list[int]) -> tuple[Host, ...] | None:
    return (
        tuple(Host(name, slots) for name, slots in zip(names, counts, strict=True))
        if len(names) == len(counts)
        else None
    )


# ---------------------------------------------------------------------------------------------------- files
# at hand


def _launcher_hostfile(clues: Clues) -> Path | None:
    """The hostfile argument of the nearest launcher of this kind among the ancestors.

    The first occurrence counts: a launcher's own options stand before the script, and a later --hostfile is
        the script's.
    """
    options = _HOSTFILE_OPTIONS.get(clues.identity.kind, ())
    is_launcher = _is_deepspeed if clues.identity.kind == "deepspeed" else _is_mpirun
    for words in clues.cmdlines:
        if is_launcher(words) and (path := _option(words, options)):
            return clues.cwd / path
    return None


def _is_deepspeed(words: Sequence[str]) -> bool:
    """The `deepspeed` command is a Python script: its name stands behind the interpreter's."""
    return (
        any(PurePosixPath(word).name in ("deepspeed", "ds") for word in words[:2])
        or "deepspeed.launcher.runner" in words[:4]
    )


def _is_mpirun(words: Sequence[str]) -> bool:
    return bool(words) and PurePosixPath(words[0]).name in _MPIRUNS


def _option(words: Sequence[str], names: tuple[str, ...]) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in names:
            return following or None
        for name in names:
            if name.startswith("--") and word.startswith(f"{name}="):
                return word.partition("=")[2] or None
    return None


def _shelf(cwd: Path) -> tuple[list[Hostfile], list[str]]:
    """The readable hostfiles that may be meant, and for the others the reason; a broken file must not stop a
    job that needs another.
    """
    folder = cwd / "hostfiles"
    paths = (
        sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        if folder.is_dir()
        else []
    )
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


def _with_facts(hosts: tuple[Host, ...], clues: Clues) -> Layout:
    """The same hosts and slots with the facts of a file at hand that names them all.

    Raises:
        HostfileError: files state different facts, or only names that are short for several hosts of a file
            lead to it.
    """
    described = []
    unclear = []
    for file in _shelf(clues.cwd)[0]:
        try:
            known = [_described(file, host.name) for host in hosts]
        except HostfileError as error:
            unclear.append(error)
            continue
        if all(known):
            pairs = zip(known, hosts, strict=True)
            described.append((
                file,
                tuple(replace(other, name=host.name, slots=host.slots) for other, host in pairs),
            ))
    if unclear and not described:
        raise unclear[0]
    return _unambiguous(described) or (None, hosts)


def _described(file: Hostfile, name: str) -> Host | None:
    """The host of the file that has this name in full, else the one that it is short for.

    Raises:
        HostfileError: it is short for several, about which the file states different facts.
    """
    found = matching_hosts(file.hosts, name)
    if len(found) > 1:
        # Asked only here: a name service may take seconds to answer.
        found = matching_hosts(found, socket.getfqdn(name))
    if len({(host.facts, file.cluster(host.cluster).trust) for host in found}) > 1:
        raise HostfileError(
            f"{file.path}: host {name} of this job may be {' or '.join(host.name for host in found)}, about "
            "which the file "
            f"states different facts; add `--hostfile FILE` behind launch.py or set {HOSTFILE_VARIABLE}, "
            "with the hosts of "
            "this job alone"
        )
    return found[0] if found else None


def _unambiguous(layouts: list[tuple[Hostfile, tuple[Host, ...]]]) -> Layout | None:
    """The first of layouts that all say the same, None of none. Raises HostfileError if they differ."""
    meanings: dict[tuple, list[tuple[Hostfile, tuple[Host, ...]]]] = {}
    for file, hosts in layouts:
        meaning = tuple(
            (host.name, host.slots, host.facts, file.cluster(host.cluster).trust) for host in hosts
        )
        meanings.setdefault(meaning, []).append((file, hosts))
    if len(meanings) > 1:
        files = ", ".join(group[0][0].path for group in meanings.values())
        raise HostfileError(
            f"{files}: all name the hosts of this job, but state different facts about them; add "
            "`--hostfile FILE` behind "
            f"launch.py or set {HOSTFILE_VARIABLE}"
        )
    return layouts[0] if layouts else None


def _listed(hosts: Sequence[Host]) -> str:
    return ", ".join(f"{host.name} slots={host.slots}" for host in hosts)


def _looked_at(files: list[Hostfile], broken: list[str]) -> str:
    seen = [f"{file.path}: {_listed(file.hosts)}" for file in files] + [
        f"not readable: {reason}" for reason in broken
    ]
    return "".join(f"\n  - {line}" for line in ["looked at:", *seen]) if seen else ""

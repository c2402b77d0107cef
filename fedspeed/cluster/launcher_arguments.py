"""What the command lines of launchers say about hosts: DeepSpeed's world info and hostfile options."""

import base64
import json
from collections.abc import Sequence
from pathlib import PurePosixPath

from fedspeed.errors import HostfileError

_MPI_LAUNCHERS = {"mpirun", "mpiexec", "prterun", "prun", "orterun", "mpiexec.hydra"}
_HOSTFILE_OPTIONS = {
    "deepspeed": ("-H", "--hostfile"),
    "openmpi": ("--hostfile", "-hostfile", "--machinefile", "-machinefile"),
    "mpi": ("-f", "--hostfile", "-hostfile", "-machinefile"),
}


def world_info_of(cmdlines: Sequence[Sequence[str]]) -> dict[str, int] | None:
    """Return host -> number of ranks from the nearest ancestor with DeepSpeed's --world_info; None without
    one.

    Args:
        cmdlines: command lines of the ancestor processes, the parent's first.

    Raises:
        HostfileError: the value of --world_info cannot be decoded.
    """
    for arguments in cmdlines:
        for argument in arguments:
            if argument.startswith("--world_info="):
                return _decode_world_info(argument.removeprefix("--world_info="))
    return None


def hostfile_argument(kind: str, cmdlines: Sequence[Sequence[str]]) -> str | None:
    """Return the hostfile that the nearest launcher of this kind was given; None without one.

    The first occurrence of the option counts: a launcher's own options precede the script, and a later
    --hostfile is an argument of the script.

    Args:
        kind: of the launcher, as in `RankIdentity`.
        cmdlines: command lines of the ancestor processes, the parent's first.
    """
    options = _HOSTFILE_OPTIONS.get(kind, ())
    is_launcher = _is_deepspeed if kind == "deepspeed" else _is_mpirun
    for arguments in cmdlines:
        if is_launcher(arguments) and (path := _option_value(arguments, options)):
            return path
    return None


def _decode_world_info(text: str) -> dict[str, int]:
    try:
        world = json.loads(base64.urlsafe_b64decode(text))
        return {str(host): len(slots) for host, slots in world.items()}
    except (ValueError, AttributeError, TypeError):
        raise HostfileError(
            f"--world_info={text} on the DeepSpeed launcher's command line is not understood; name the "
            "hosts with `launch.py --hostfile FILE`"
        ) from None


def _is_deepspeed(arguments: Sequence[str]) -> bool:
    """Return whether a command line is DeepSpeed's: a Python script, whose name follows the interpreter's."""
    is_script = any(PurePosixPath(argument).name in ("deepspeed", "ds") for argument in arguments[:2])
    return is_script or "deepspeed.launcher.runner" in arguments[:4]


def _is_mpirun(arguments: Sequence[str]) -> bool:
    return bool(arguments) and PurePosixPath(arguments[0]).name in _MPI_LAUNCHERS


def _option_value(arguments: Sequence[str], options: tuple[str, ...]) -> str | None:
    """Return the value of the first of these options: `--option value` or `--option=value`."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in options:
            return following or None
        for option in options:
            if option.startswith("--") and argument.startswith(f"{option}="):
                return argument.partition("=")[2] or None
    return None

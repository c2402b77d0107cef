"""`fedspeed run`: run a federated fine-tuning, as launch.py does."""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fedspeed.cli.arguments import PROJECT, QUICKSTART, Commands, file_name
from fedspeed.cli.output import print_result, report_ending
from fedspeed.cli.packages import missing_package, need_packages
from fedspeed.cli.rank_process import prepare_rank
from fedspeed.errors import EXIT_OK, LostPeerError, ModelError
from fedspeed.session.ending import Ending, error_ending

if TYPE_CHECKING:
    from fedspeed.cluster.discover import Launch
    from fedspeed.config.load import Loaded

# Timeout for the quickstart's base to be pretrained.
BASE_TIMEOUT_S = 600.0
EXIT_CODES = """exit codes:
  0   finished, and every update of every round counted
  1   an unexpected error, or updates that did not count (the report names them)
  2   bad input: configuration, hostfile, data, model or journal
  75  a rank was lost or the run was asked to end; the same command resumes
"""


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    # Abbreviations are not allowed: the supervisor removes some arguments before it starts the ranks, and
    # looks for their full names.
    parser = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="run a federated fine-tuning (what launch.py does)",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a federated fine-tuning, or resume it where its journal ends. Started by "
        "deepspeed, mpirun, "
        "srun or torchrun it is one rank; started by plain python it starts the local ranks itself.",
    )
    parser.add_argument(
        "--config",
        type=file_name,
        default=QUICKSTART,
        metavar="YAML",
        help="configuration of the run (default: the quickstart)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="values over the configuration's, such as train.lr=1e-4",
    )
    parser.add_argument(
        "--hostfile", type=file_name, help="the hostfile the launcher was given, where it cannot be found out"
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="show every value, what it means and where it came from, and stop",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check configuration, hosts, data and model files, and stop"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start anew; an earlier run of the same name is moved aside"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per round on stdout, progress on stderr"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # DeepSpeed's launcher adds it
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run as a rank, start the local ranks, or show the configuration; return the exit code."""
    from fedspeed.cluster.discover import from_process
    from fedspeed.config.load import load

    loaded = load(arguments.config, arguments.overrides)
    if arguments.print_config or arguments.dry_run:
        return _show(loaded, arguments)
    need_packages()
    from fedspeed.models.checks import QUICKSTART_BASE

    launch = from_process(arguments.hostfile)
    if loaded.config.model.base == QUICKSTART_BASE:
        _make_base(Path(QUICKSTART_BASE), launch)
    if launch.kind == "none":
        return _run_local(loaded, arguments, launch)
    return _rank(arguments)


def _make_base(folder: Path, launch: "Launch") -> None:
    """Pretrain the quickstart's base where it is missing: on the first rank of every host.

    It is made by a process of its own, since it needs torch.
    """
    deadline = time.monotonic() + BASE_TIMEOUT_S
    if not (folder / "config.json").exists() and launch.local_rank == 0:
        done = subprocess.run(
            [sys.executable, "-m", "fedspeed", "pretrain-base", str(folder)],
            cwd=Path.cwd(),
            timeout=BASE_TIMEOUT_S,
            check=False,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        if done.returncode:
            raise ModelError(
                f"model.base={folder} could not be made, its own message stands above; mend that, or give "
                "another model.base"
            )
    while not (folder / "config.json").exists():
        if time.monotonic() > deadline:
            raise LostPeerError(
                f"{folder} did not appear within {BASE_TIMEOUT_S:.0f} s; make it with `python -m fedspeed "
                f"pretrain-base {folder}`"
            )
        time.sleep(0.5)


def _show(loaded: "Loaded", arguments: argparse.Namespace) -> int:
    """Print the configuration or the results of a dry run, as the arguments request."""
    from fedspeed.config.deepspeed import merge
    from fedspeed.config.show import render

    merged = merge(loaded.config.deepspeed, loaded.config, loaded.folder)
    if arguments.print_config:
        print_result(render(loaded, merged, explained=True).lstrip())
    if arguments.dry_run:
        need_packages()
        from fedspeed.monitor.activity_line import ActivityLine
        from fedspeed.session.dry_run import dry_run
        from fedspeed.session.request import RunRequest

        with ActivityLine() if loaded.config.monitor.progress else contextlib.nullcontext():
            text = dry_run(RunRequest(loaded, arguments.hostfile, fresh=arguments.fresh))
        print_result(f"{text}\nnothing was started")
    return EXIT_OK


def _rank(arguments: argparse.Namespace, env: Mapping[str, str] | None = None) -> int:
    """Run as one rank; return its exit code.

    Args:
        arguments: of the command.
        env: changes to the environment, if the process was forked rather than started.
    """
    json_out = prepare_rank(env, as_json=arguments.json)
    ending = _ending_of_rank(arguments, json_out)
    report_ending(ending, json_out)
    sys.stdout.flush()
    sys.stderr.flush()
    return ending.code_for_supervisor if os.environ.get("FEDSPEED_LAUNCH") == "local" else ending.exit_code


def _ending_of_rank(arguments: argparse.Namespace, json_out: TextIO | None) -> Ending:
    """Run as one rank and return how the run ended for it."""
    try:
        from fedspeed.config.load import load
        from fedspeed.session.rank import run_rank
        from fedspeed.session.request import RunRequest

        loaded = load(arguments.config, arguments.overrides)
        return run_rank(RunRequest(loaded, arguments.hostfile, json_out, arguments.fresh))
    except ModuleNotFoundError as error:
        return error_ending(missing_package(error))
    except Exception as error:
        return error_ending(error)


def _run_local(loaded: "Loaded", arguments: argparse.Namespace, launch: "Launch") -> int:
    """Start the local ranks under a supervisor, which restarts them from the journal if one is lost."""
    # numpy is imported next, and ranks are forked from this process's children: its threads would not
    # survive.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from fedspeed.session.local_run import supervise
    from fedspeed.session.preflight import check
    from fedspeed.session.request import RunRequest

    check(loaded, arguments.hostfile)  # what can be refused without waiting for the ranks' imports
    request = RunRequest(loaded, arguments.hostfile, fresh=arguments.fresh)
    arguments.fresh = False
    argv = [a for a in sys.argv[1:] if a != "--fresh"]
    ending = supervise(request, launch, argv, lambda env: _rank(arguments, env))
    return report_ending(ending, None)

"""The command line. Heavy libraries are imported by the ranks only: `--help`, `--print-config`, `--dry-run` and `doctor` know no torch."""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspeed import __version__
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, FedSpeedError

PROJECT = Path(__file__).resolve().parent.parent
QUICKSTART = PROJECT / "ds_configs" / "quickstart.yaml"

LAST_WORDS_S = 15.0  # for the survivors of a lost rank to find out who it was, and to write the report

EXIT_CODES = """exit codes:
  0   finished, and every update of every round counted
  1   an unexpected error, or updates that did not count (the report names them)
  2   bad input: configuration, hostfile, data, model or journal
  75  a rank was lost or the run was asked to end; the same command resumes
"""


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings tell of every poll of a store
    try:
        return arguments.command(arguments)
    except FedSpeedError as error:
        from fedspeed.cluster.once import report

        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedspeed", description="Federated fine-tuning of language models on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"fedspeed {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run a federated fine-tuning (what launch.py does)", epilog=EXIT_CODES,
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Run a federated fine-tuning, or resume it where its journal ends. Started by deepspeed, mpirun, "
                                          "srun or torchrun it is one rank; started by plain python it starts the local ranks itself.")
    run.add_argument("--config", type=Path, default=QUICKSTART, metavar="YAML", help="configuration of the run (default: the quickstart)")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's, such as train.lr=1e-4")
    run.add_argument("--hostfile", type=Path, help="the hostfile the launcher was given, where it cannot be found out")
    run.add_argument("--print-config", action="store_true", help="show every value and where it came from, and stop")
    run.add_argument("--dry-run", action="store_true", help="check configuration, hosts, data and model files, and stop")
    run.add_argument("--fresh", action="store_true", help="start anew; an earlier run of the same name is moved aside")
    run.add_argument("--json", action="store_true", help="one JSON object per round on stdout, progress on stderr")
    run.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    run.set_defaults(command=_run)

    doctor = commands.add_parser("doctor", help="say what this machine lacks")
    doctor.set_defaults(command=_doctor)

    base = commands.add_parser("pretrain-base", help="pretrain the quickstart's tiny base model on the spot")
    base.add_argument("folder", type=Path, help="where to write it (skipped if it is there already)")
    base.add_argument("--seed", type=int, default=0)
    base.set_defaults(command=_pretrain)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from fedspeed.cluster.discover import from_process
    from fedspeed.config.load import load

    for word in arguments.overrides:
        if "=" not in word:
            raise FedSpeedError(f"`{word}` is no override; write key=value, such as federation.rounds=5")
    loaded = load(arguments.config, arguments.overrides)
    if arguments.print_config or arguments.dry_run:
        return _show(loaded, arguments)
    launch = from_process(arguments.hostfile)
    if launch.kind == "none":
        return _run_local(loaded, arguments, launch)
    return _rank(arguments)


def _show(loaded, arguments: argparse.Namespace) -> int:
    from fedspeed.config.deepspeed import merge
    from fedspeed.config.show import render

    merged = merge(loaded.config.deepspeed, loaded.config, loaded.folder)
    if arguments.print_config:
        print(render(loaded, merged))
    if arguments.dry_run:
        from fedspeed.preflight import check

        print(check(loaded, arguments.hostfile))
    return EXIT_OK


def _rank(arguments: argparse.Namespace, env: Mapping[str, str] | None = None) -> int:
    """Be one rank. `env`: the environment to be it in, where the process was forked rather than started."""
    import traceback

    if env is not None:
        os.environ.update(env)
    from fedspeed.monitor.stdout import claim_stdout

    json_out = claim_stdout() if arguments.json else None  # before anything keeps a reference to stdout
    try:
        from fedspeed.config.load import load
        from fedspeed.session import Order, run_rank

        code = run_rank(Order(load(arguments.config, arguments.overrides), arguments.hostfile, json_out))
    except FedSpeedError as error:
        from fedspeed.cluster.once import report

        report(error)
        code = error.exit_code
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run_local(loaded, arguments: argparse.Namespace, launch) -> int:
    """Plain `python launch.py`: start the ranks, watch them, and start them again from the journal when one is lost."""
    from fedspeed.checkpoint.journal import Journal
    from fedspeed.cluster.local import local_rank_count, run_local
    from fedspeed.session import preload, run_folder

    config, folder = loaded.config, run_folder(loaded)
    if arguments.fresh and folder.exists():
        print(f"fedspeed: the earlier run is now {_move_aside(folder)}", file=sys.stderr)
    ranks = sum(h.slots for h in launch.hosts) if launch.hostfile else local_rank_count(config.cluster.local_ranks, config.data.clients)
    journal = Journal(folder, config.checkpoint.keep)
    entry = journal.latest()  # a damaged journal is reported before anything starts
    if entry is not None and entry.done and not (entry.done == "finished" and config.federation.rounds > entry.round):
        print(f"fedspeed: {folder} is complete ({entry.done}, {entry.round} rounds): see {folder / 'report.md'}. A larger "
              "federation.rounds goes on from there, --fresh starts anew.", file=sys.stderr)
        return EXIT_OK

    def progressed() -> int:
        return journal.newest()

    said = []

    def log(text: str) -> None:
        said.append((time.time(), text))
        print(f"fedspeed: {text}", file=sys.stderr, flush=True)

    env = {"DS_ACCELERATOR": "cpu"} if "DS_ACCELERATOR" not in os.environ and not _gpus() else {}
    os.environ.update(env)
    arguments.fresh = False
    argv = [a for a in sys.argv[1:] if a != "--fresh"]
    code = run_local(argv, ranks, dict(os.environ), config.cluster.max_restarts, progressed, log,
                     preload=preload, target=lambda env: _rank(arguments, env), end_s=LAST_WORDS_S)
    if code not in (EXIT_OK, EXIT_USAGE) and said:
        _report_killed(loaded, folder, ranks, said, code)
    return code


def _report_killed(loaded, folder: Path, ranks: int, said: list[tuple[float, str]], code: int) -> None:
    """The report of a run whose reporting rank died without a word: what the supervisor knows. A rank's own report knows more."""
    written = folder / "report.md"
    if written.exists() and written.stat().st_mtime >= said[-1][0] - LAST_WORDS_S:
        return
    from fedspeed.config.deepspeed import merge
    from fedspeed.config.show import render
    from fedspeed.monitor.records import MissingUpdates, summarise
    from fedspeed.monitor.report import Facts, write_report
    from fedspeed.monitor.round_log import RoundLog

    config = loaded.config
    records = RoundLog(folder / "rounds.jsonl", resume_round=config.federation.rounds).read()
    if not records:
        return
    number = records[-1].round + 1
    gap = MissingUpdates(number, config.data.clients) if number <= config.federation.rounds else None
    summary = summarise(records, status="failed", total_rounds=config.federation.rounds, reason="; ".join(text for _, text in said), exit_code=code,
                        restarts=max(0, len(said) - 1), also_missing=(gap,) if gap else ())
    text = render(loaded, merge(config.deepspeed, config, loaded.folder))
    path = write_report(folder, records, summary, text, Facts(run={"ranks": str(ranks)}), routing_mode=config.routing.mode, plot=config.monitor.plot)
    print(f"fedspeed: round {number} is not finished; report: {path}", file=sys.stderr)


def _gpus() -> int:
    from fedspeed.cluster.devices import visible_gpus

    return visible_gpus(os.environ)


def _move_aside(folder: Path) -> Path:
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def _doctor(arguments: argparse.Namespace) -> int:
    from fedspeed.cluster.doctor import checks, render

    found = checks()
    print(render(found))
    return EXIT_OK if all(c.ok for c in found) else EXIT_USAGE


def _pretrain(arguments: argparse.Namespace) -> int:
    from fedspeed.quickstart import pretrain

    pretrain(arguments.folder, arguments.seed)
    return EXIT_OK

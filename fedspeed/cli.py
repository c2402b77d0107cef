"""The command line. Heavy libraries are imported where a model is looked at only: `--help`, `--print-config`, `plan`, `simulate` and `doctor` know no torch."""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedspeed import __version__
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ConfigError, FedSpeedError, LostPeerError, MissingPackage, ModelError, PlanError, Preempted

PROJECT = Path(__file__).resolve().parent.parent
QUICKSTART = PROJECT / "ds_configs" / "quickstart.yaml"
BASE_S = 600.0  # for the quickstart's base to be pretrained
NEEDED = ("numpy", "torch", "deepspeed", "transformers", "peft", "safetensors")  # to train; looked for before anything is started
MAX_SEED = 2**32 - 1

EXIT_CODES = """exit codes:
  0   finished, and every update of every round counted
  1   an unexpected error, or updates that did not count (the report names them)
  2   bad input: configuration, hostfile, data, model or journal
  75  a rank was lost or the run was asked to end; the same command resumes
"""


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    arguments = _arguments(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings tell of every poll of a store
    try:
        return arguments.command(arguments)
    except FedSpeedError as error:
        from fedspeed.cluster.once import report

        report(error)
        return error.exit_code
    except ModuleNotFoundError as error:
        from fedspeed.cluster.once import report

        report(_missing(error))
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def _missing(error: ModuleNotFoundError) -> MissingPackage:
    """A package that is not there, in a user's words; one of ours that is not there is our own fault."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "fedspeed"):
        raise error
    return MissingPackage([name], sys.executable)


def _need_packages() -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingPackage(missing, sys.executable)


def _say(text: str) -> None:
    """Print what a command was asked for. A reader that has seen enough (`| head`) is no fault; a disk that is full is one."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more when it ends
        if not isinstance(error, BrokenPipeError):
            raise FedSpeedError(f"standard output cannot be written ({error.strerror}); send it elsewhere") from error


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file")
    return Path(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= MAX_SEED):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least 0 and at most {MAX_SEED}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least 1")
    return int(text)


def _numbers(text: str) -> frozenset[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and len(word) < 6 for word in words):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list of whole numbers with commas")
    return frozenset(map(int, words))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """argparse takes positional words from one place only; `a=1 --json b=2` has overrides in two."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedspeed", description="Federated fine-tuning of language models on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"fedspeed {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    # No abbreviations: what the supervisor takes out of the arguments for its ranks must be found there as it is called here.
    run = commands.add_parser("run", allow_abbrev=False, help="run a federated fine-tuning (what launch.py does)", epilog=EXIT_CODES,
                              formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Run a federated fine-tuning, or resume it where its journal ends. Started by deepspeed, mpirun, "
                                          "srun or torchrun it is one rank; started by plain python it starts the local ranks itself.")
    run.add_argument("--config", type=_file, default=QUICKSTART, metavar="YAML", help="configuration of the run (default: the quickstart)")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's, such as train.lr=1e-4")
    run.add_argument("--hostfile", type=_file, help="the hostfile the launcher was given, where it cannot be found out")
    run.add_argument("--print-config", action="store_true", help="show every value and where it came from, and stop")
    run.add_argument("--dry-run", action="store_true", help="check configuration, hosts, data and model files, and stop")
    run.add_argument("--fresh", action="store_true", help="start anew; an earlier run of the same name is moved aside")
    run.add_argument("--json", action="store_true", help="one JSON object per round on stdout, progress on stderr")
    run.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    run.set_defaults(command=_run)

    doctor = commands.add_parser("doctor", help="say what this machine lacks")
    doctor.set_defaults(command=_doctor)

    planner = commands.add_parser("plan", allow_abbrev=False, help="say how a model fits on the hosts, how fast it trains, and with which settings",
                                  description="Predict memory and time of every way to execute a run on the hosts of a hostfile, and print the "
                                              "fastest that fits. Nothing is started, nothing is read but dimensions.")
    _say_what_is_planned(planner)
    planner.add_argument("--model", help="a known model, a folder with config.json, or a config.json (model.base)")
    planner.add_argument("--clients", type=int, help="number of clients (data.clients; without a configuration: one a host)")
    planner.add_argument("--micro-batch", type=int, help="sequences of one forward and backward (default: the plan divides the rows)")
    planner.add_argument("--quantised", action="store_true", help="weigh a base in 8 and 4 bits too (engine.tier=int8, nf4), which gives other losses")
    planner.add_argument("--json", action="store_true", help="the plan as one JSON object on stdout")
    planner.set_defaults(command=_plan)

    simulator = commands.add_parser("simulate", allow_abbrev=False, help="say what training takes on hosts that are not here", description=
                                    "Memory, step time, whole training and throughput of the planner's choice and of pipelines, whose instruction streams "
                                    "are executed against the planner's model of time: models x tasks on the hosts of a hostfile, and for many clients.")
    _say_what_is_planned(simulator)
    simulator.add_argument("--model", action="append", metavar="MODEL", help="a known model, a folder with config.json, or a config.json; several: once for "
                                                                             "each (default: the mission's five)")
    simulator.add_argument("--epochs", type=_positive, default=1, help="how often training sees a task's rows (default: 1)")
    simulator.add_argument("--scale", type=_positive, action="append", metavar="CLIENTS", help="many clients, each on a server of its own; several: once for "
                                                                                               "each (default: 100, 1000, 10000)")
    simulator.add_argument("--json", action="store_true", help="all of it as a JSON list on stdout, a model an item")
    simulator.set_defaults(command=_simulate)

    probe = commands.add_parser("probe", help="measure what this machine can do, for `plan --probe`")
    probe.add_argument("--out", type=_file, metavar="FILE", help="where to write it (default: stdout)")
    probe.add_argument("--disk", type=Path, default=Path(), metavar="FOLDER", help="folder on the disk to measure (default: this one)")
    probe.set_defaults(command=_probe)

    auditor = commands.add_parser("audit", allow_abbrev=False, help="measure what a coalition learns of single clients in the anonymous modes", description=
                                  "Trains the clients of a configuration in one process, plays the exchange over their updates, and lets attackers with the "
                                  "views of a coalition pair the updates of one round with those of the next.")
    auditor.add_argument("--config", type=_file, default=QUICKSTART, metavar="YAML", help="configuration of a run (default: the quickstart)")
    auditor.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's")
    auditor.add_argument("--rounds", type=_positive, default=40, help="rounds to train and to exchange (default: 40)")
    auditor.add_argument("--words", type=_positive, default=4096, help="of every update, how many values are exchanged (default: 4096)")
    auditor.add_argument("--modes", default="mix,mix+mask", help="which routing modes (default: mix,mix+mask)")
    for role, helps in (("owners", "who tell the cells of their chunks (default: all)"), ("relays", "who tell how they permute (default: none)"),
                        ("clients", "who tell their own cells (default: none)")):
        auditor.add_argument(f"--{role}", type=_numbers, metavar="0,1,...", help=f"members of the coalition {helps}")
    auditor.add_argument("--json", action="store_true", help="the findings as one JSON object on stdout")
    auditor.set_defaults(command=_audit)

    keys = commands.add_parser("keys", help="make identities and the roster of a federation of organisations", description=
                               "An identity is made once by each organisation, the roster once by who runs the federation (docs/organisations.md).")
    what = keys.add_subparsers(metavar="WHAT", required=True)
    new = what.add_parser("new", help="make an identity: NAME.key, to be kept secret, and NAME.json, to be given to who makes the roster")
    new.add_argument("name")
    new.add_argument("--address", required=True, metavar="HOST:PORT", help="where this site listens for the others")
    new.add_argument("--out", type=_file, default=Path("keys"), metavar="FOLDER", help="where to write them (default: keys)")
    new.set_defaults(command=_keys_new)
    roster = what.add_parser("roster", help="sign a roster of members")
    roster.add_argument("cards", nargs="+", type=_file, metavar="CARD", help="the members' NAME.json, in the order that numbers them")
    roster.add_argument("--signer", required=True, type=_file, metavar="KEY", help="private key of who runs the federation")
    roster.add_argument("--epoch", type=int, default=1, help="number of the roster; higher for a newer one (default: 1)")
    roster.add_argument("--out", type=_file, default=Path("roster.json"), metavar="FILE")
    roster.set_defaults(command=_keys_roster)
    show = what.add_parser("show", help="print the public key of a card or a private key's file, to be compared and pinned")
    show.add_argument("file", type=_file)
    show.set_defaults(command=_keys_show)

    base = commands.add_parser("pretrain-base", help="pretrain the quickstart's tiny base model on the spot")
    base.add_argument("folder", type=_file, help="where to write it (skipped if it is there already)")
    base.add_argument("--seed", type=_seed, default=0)
    base.set_defaults(command=_pretrain)
    return parser


def _say_what_is_planned(parser: argparse.ArgumentParser) -> None:
    """Words that `plan` and `simulate` have in common."""
    parser.add_argument("--hostfile", type=_file, required=True, help="the hosts and their facts")
    parser.add_argument("--config", type=_file, metavar="YAML", help="configuration of a run, to take its values from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's, such as adapter.lora_rank=16")
    parser.add_argument("--tokens", type=int, help="length of a sequence (data.max_tokens)")
    parser.add_argument("--rows", type=int, help="sequences of an optimizer step on each rank (default: train.micro_batch x train.accumulation)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="numeric type (default: the fastest that all cards have)")
    parser.add_argument("--probe", type=_file, action="append", default=[], metavar="FILE", help="what `fedspeed probe` wrote; once for each machine")


def _run(arguments: argparse.Namespace) -> int:
    from fedspeed.cluster.discover import from_process
    from fedspeed.config.load import load

    loaded = load(arguments.config, arguments.overrides)
    if arguments.print_config or arguments.dry_run:
        return _show(loaded, arguments)
    _need_packages()
    from fedspeed.preflight import QUICKSTART_BASE

    launch = from_process(arguments.hostfile)
    if loaded.config.model.base == QUICKSTART_BASE:
        _make_base(Path(QUICKSTART_BASE), launch)
    if launch.kind == "none":
        return _run_local(loaded, arguments, launch)
    return _rank(arguments)


def _make_base(folder: Path, launch) -> None:
    """The quickstart's base, where it is not there yet: made by the first rank of every host, in a process of its own (it needs torch)."""
    end = time.monotonic() + BASE_S
    if not (folder / "config.json").exists() and launch.local_rank == 0:
        done = subprocess.run([sys.executable, "-m", "fedspeed", "pretrain-base", str(folder)], cwd=Path.cwd(), timeout=BASE_S, check=False,
                              env={**os.environ, "PYTHONPATH": str(PROJECT)})
        if done.returncode:
            raise ModelError(f"model.base={folder} could not be made, its own message stands above; mend that, or give another model.base")
    while not (folder / "config.json").exists():
        if time.monotonic() > end:
            raise LostPeerError(f"{folder} did not appear within {BASE_S:.0f} s; make it with `python -m fedspeed pretrain-base {folder}`")
        time.sleep(0.5)


def _show(loaded, arguments: argparse.Namespace) -> int:
    from fedspeed.config.deepspeed import merge
    from fedspeed.config.show import render

    merged = merge(loaded.config.deepspeed, loaded.config, loaded.folder)
    if arguments.print_config:
        _say(render(loaded, merged))
    if arguments.dry_run:
        _need_packages()
        from fedspeed.session.order import Order
        from fedspeed.session.rehearsal import rehearse

        _say(rehearse(Order(loaded, arguments.hostfile, fresh=arguments.fresh)) + "\nnothing was started")
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
        from fedspeed.session.order import Order
        from fedspeed.session.rank import run_rank

        code = run_rank(Order(load(arguments.config, arguments.overrides), arguments.hostfile, json_out, arguments.fresh))
        if code == EXIT_FAILED and os.environ.get("FEDSPEED_LAUNCH") == "local":
            code = EXIT_OK  # a finished run that lacks updates; its supervisor finds that in the log, and takes other ends for crashes
    except FedSpeedError as error:
        from fedspeed.cluster.once import first_to_speak, report

        # Asked to end are all ranks alike, be it because another one has refused its input and said so.
        if not isinstance(error, Preempted) or first_to_speak(os.environ):
            report(error)
        code = error.exit_code
    except ModuleNotFoundError as error:
        from fedspeed.cluster.once import report

        report(_missing(error))
        code = EXIT_USAGE
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run_local(loaded, arguments: argparse.Namespace, launch) -> int:
    """Plain `python launch.py`: start the ranks, watch them, and start them again from the journal when one is lost."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy is imported here, and the ranks are forked from what this process forks
    from fedspeed.preflight import check
    from fedspeed.session.machine import supervise
    from fedspeed.session.order import Order

    check(loaded, arguments.hostfile)  # what can be refused without waiting for the ranks' imports
    order = Order(loaded, arguments.hostfile, fresh=arguments.fresh)
    arguments.fresh = False
    argv = [a for a in sys.argv[1:] if a != "--fresh"]
    return supervise(order, launch, argv, lambda env: _rank(arguments, env))


def _doctor(arguments: argparse.Namespace) -> int:
    from fedspeed.cluster.doctor import checks, render

    found = checks()
    _say(render(found))
    return EXIT_OK if all(c.ok for c in found) else EXIT_USAGE


def _audit(arguments: argparse.Namespace) -> int:
    import dataclasses
    import json

    from fedspeed.config.load import load

    _need_packages()
    loaded = load(arguments.config, arguments.overrides)
    from fedspeed.routing.audit.adversary import Coalition
    from fedspeed.session.audit import PLAYED, audit, render

    modes = arguments.modes.split(",")
    if unknown := [mode for mode in modes if mode not in PLAYED]:
        raise ConfigError(f"--modes: {', '.join(unknown)} is none of {', '.join(PLAYED)}")
    if arguments.owners is arguments.relays is arguments.clients is None:
        coalition = None
    else:
        everyone = frozenset(range(loaded.config.data.clients))
        coalition = Coalition(everyone if arguments.owners is None else arguments.owners, arguments.relays or frozenset(), arguments.clients or frozenset())
    found = audit(loaded, arguments.rounds, arguments.words, modes, coalition)
    _say(json.dumps(dataclasses.asdict(found), indent=1) if arguments.json else render(found, coalition))
    return EXIT_OK


def _keys_new(arguments: argparse.Namespace) -> int:
    from fedspeed.routing import identity

    secret, public = identity.make(arguments.name, arguments.address, arguments.out)
    _say(f"{secret}: keep it on this site, nobody else needs it\n{public}: give it to who makes the roster\n"
         f"public key {identity.fingerprint(identity.read_card(public).key)}")
    return EXIT_OK


def _keys_roster(arguments: argparse.Namespace) -> int:
    from fedspeed.files import write_atomically
    from fedspeed.routing import identity
    from fedspeed.routing.anonymous.crypto import public_of

    signer = identity.read_key(arguments.signer)
    cards = [identity.read_card(path) for path in arguments.cards]
    write_atomically(arguments.out, identity.sign_roster(cards, signer, arguments.epoch).encode())
    members = "\n".join(f"  {i}  {card.name}  {card.address}  {identity.fingerprint(card.key)}" for i, card in enumerate(cards))
    _say(f"{arguments.out}: epoch {arguments.epoch}, {len(cards)} members\n{members}\n"
         f"every site pins routing.roster_signer={identity.fingerprint(public_of(signer))}")
    return EXIT_OK


def _keys_show(arguments: argparse.Namespace) -> int:
    from fedspeed.routing import identity
    from fedspeed.routing.anonymous.crypto import public_of

    card = arguments.file.suffix == ".json"
    _say(identity.fingerprint(identity.read_card(arguments.file).key if card else public_of(identity.read_key(arguments.file))))
    return EXIT_OK


def _pretrain(arguments: argparse.Namespace) -> int:
    from fedspeed.quickstart import pretrain

    _need_packages()
    pretrain(arguments.folder, arguments.seed)
    return EXIT_OK


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from fedspeed.planner import search
    from fedspeed.planner.explain import as_values, explain
    from fedspeed.planner.task import notes_of

    task, places, nodes = _asked(arguments, arguments.model, arguments.clients, arguments.micro_batch, arguments.quantised)
    found = search.plan(task, places, nodes, notes_of(places, nodes))
    _say(json.dumps(as_values(found), indent=1) if arguments.json else explain(found))
    return EXIT_OK


def _simulate(arguments: argparse.Namespace) -> int:
    import json

    from fedspeed.cluster.hostfile import read
    from fedspeed.planner.explain_simulation import as_values, told
    from fedspeed.planner.simulate import MODELS, SCALES, TASKS, simulated

    def alone(model: str) -> list:
        """A client by itself on each kind of host."""
        kinds = {(host.slots, host.facts): host for host in read(arguments.hostfile).hosts}
        return [_asked(arguments, model, 1, hosts=[host], words=["cluster.ranks_per_client=auto"]) for host in kinds.values()]

    found = []
    for model in arguments.model or MODELS:
        jobs = [(job, *_asked(arguments, model, job.clients)) for job in TASKS]
        found.append(simulated(jobs, alone(model), arguments.epochs, arguments.scale or SCALES))
    _say(json.dumps(as_values(found), indent=1) if arguments.json else told(found, arguments.epochs))
    return EXIT_OK


def _asked(arguments: argparse.Namespace, model: str | None, clients: int | None, micro_batch: int | None = None, quantised: bool = False, hosts=None,
           words: Sequence[str] = ()):
    """(task, topology, nodes) that the arguments of `plan` and `simulate` describe.

    Args:
        model, clients: None: as the configuration says; without one, one client a host.
        hosts: None: those of the hostfile. words: overrides, behind the user's.
    """
    from fedspeed.cluster import topology
    from fedspeed.cluster.hostfile import read
    from fedspeed.config.deepspeed import merge
    from fedspeed.config.load import DEFAULT, load
    from fedspeed.models.catalogue import shape_of
    from fedspeed.planner.hardware import node_of
    from fedspeed.planner.task import task_of
    from fedspeed.preflight import read_probe_file

    flags = (("model.base", model), ("data.clients", clients), ("data.max_tokens", arguments.tokens), ("model.dtype", arguments.dtype))
    hosts = hosts or read(arguments.hostfile).hosts
    loaded = load(arguments.config, [*([] if arguments.config else [f"data.clients={len(hosts)}"]), *arguments.overrides,
                                     *(f"{key}={value}" for key, value in flags if value is not None), *words])
    for name, value in (("rows", arguments.rows), ("micro-batch", micro_batch)):
        if value is not None and value < 1:
            raise PlanError(f"--{name}={value}: must be at least 1")
    probes = [read_probe_file(path) for path in arguments.probe]
    places = topology.plan(hosts, loaded.config.data.clients, loaded.config.cluster.ranks_per_client)
    working = {place.host for place in places.ranks if place.clients}
    nodes = {host.name: node_of(host, probes) for host in hosts if host.name in working}
    task = task_of(loaded.config, merge(loaded.config.deepspeed, loaded.config, loaded.folder), shape_of(loaded.config.model.base),
                   [node.device for node in nodes.values()], dtype_given=loaded.sources["model.dtype"] != DEFAULT, rows=arguments.rows,
                   micro_batch=micro_batch, quantised=quantised)
    return task, places, nodes


def _probe(arguments: argparse.Namespace) -> int:
    import json

    from fedspeed.engine.probe import probe

    if not arguments.disk.is_dir():
        raise PlanError(f"--disk={arguments.disk}: no such folder; name one on the disk to be measured")
    try:
        text = json.dumps(probe(arguments.disk.resolve()), indent=1)
    except OSError as error:
        raise PlanError(f"--disk={arguments.disk}: cannot be measured ({error.strerror}); name a folder on a disk with room to write") from error
    if arguments.out:
        from fedspeed.files import write_atomically

        write_atomically(arguments.out, f"{text}\n".encode())
    else:
        _say(text)
    return EXIT_OK

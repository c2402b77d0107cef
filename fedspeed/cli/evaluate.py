"""`fedspeed eval`: score a base, a trained model or a run on evaluation tasks."""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from fedspeed.cli.arguments import Commands, file_name, not_negative, positive, probability, temperature
from fedspeed.cli.output import print_result, report_ending
from fedspeed.cli.packages import missing_package, need_packages
from fedspeed.cli.rank_process import prepare_rank
from fedspeed.errors import EXIT_OK, ConfigError
from fedspeed.session.ending import Ending, error_ending

if TYPE_CHECKING:
    from fedspeed.session.eval_request import EvalRequest

COMPARE = "compare"  # in place of a target


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="score a base, a trained model or a run on evaluation tasks",
        description="Score a model on evaluation tasks, computed by the engine as in training: on all local "
        "ranks, on the tier that the run's configuration or engine.tier=... names, so that a model that only "
        "trains with offload can be evaluated.",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="a base (folder or hub name), an exported adapter or model, or a run (its name or folder); "
        "`compare RUN...` shows the results of runs in one table",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values such as engine.tier=ram")
    parser.add_argument("--plot", type=file_name, metavar="FILE", help="compare: draw the scores as PNG")
    parser.add_argument(
        "--tasks",
        default="",
        metavar="NAME,...",
        help="evaluation tasks (default: held_out); `list` shows all",
    )
    parser.add_argument("--list", action="store_true", help="show the evaluation tasks and stop")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="N items of each task, always the same ones"
    )
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="answers to each item, of tasks that generate"
    )
    parser.add_argument(
        "--temperature", type=temperature, metavar="T", help="of the sampling; 0: always the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=probability, metavar="P", help="probability mass of the tokens to sample from"
    )
    parser.add_argument(
        "--held-out",
        type=file_name,
        metavar="FILE",
        help="rows for the tasks on held-out rows (default: those that the run's clients held out)",
    )
    parser.add_argument(
        "--out", type=file_name, metavar="FILE", help="results as JSON (default: evaluation.json of the run)"
    )
    parser.add_argument(
        "--save-answers", type=file_name, metavar="FILE", help="prompts, answers and scores as JSON lines"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for each task on stdout")
    parser.add_argument(
        "--unsafe", action="store_true", help="run generated code although there is no sandbox"
    )
    _add_other_programs(parser)
    parser.set_defaults(command=run)


def _add_other_programs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for tasks of lm-evaluation-harness and for HELM."""
    parser.add_argument(
        "--preset",
        default="",
        metavar="NAME,...",
        help="tasks of a leaderboard, unofficial: flowertune_general, _finance, _medical or _code",
    )
    parser.add_argument(
        "--lm-eval",
        default="",
        metavar="TASK,...",
        help="tasks or groups of lm-evaluation-harness (pip install -r requirements-eval.txt), or YAML files "
        "that define one",
    )
    parser.add_argument(
        "--num-fewshot", type=not_negative, metavar="N", help="examples before each item, of --lm-eval"
    )
    parser.add_argument(
        "--chat-template", action="store_true", help="put prompts of --lm-eval through the chat template"
    )
    parser.add_argument(
        "--helm",
        type=file_name,
        metavar="FOLDER",
        help="write what crfm-helm needs to evaluate an exported model, and stop",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, or show the evaluation tasks; return the exit code."""
    if arguments.list or arguments.tasks == "list":
        print_result(_listed())
        return EXIT_OK
    if arguments.target is None or "=" in arguments.target:
        raise ConfigError(
            "eval: TARGET is missing; name a base, an exported adapter or model, or a run, before the "
            "overrides"
        )
    _check_options(arguments)
    if arguments.target == COMPARE:
        return _compare(arguments)
    if arguments.helm is not None:
        return _write_helm(arguments)
    request = _request(arguments)
    need_packages()
    from fedspeed.cluster.discover import from_process

    if from_process(None).kind == "none":
        return _run_local(request, arguments)
    return _rank(request, arguments)


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect.

    Raises:
        ConfigError: there are some.
    """
    has_harness = bool(arguments.lm_eval or arguments.preset)
    unused = [
        f"{option} belongs to {place}"
        for option, is_given, place, is_there in (
            ("--plot", arguments.plot is not None, "`eval compare`", arguments.target == COMPARE),
            ("--num-fewshot", arguments.num_fewshot is not None, "--lm-eval", has_harness),
            ("--chat-template", arguments.chat_template, "--lm-eval", has_harness),
        )
        if is_given and not is_there
    ]
    if unused:
        raise ConfigError(f"eval: {', '.join(unused)}, and has no effect here; leave it out")


def _listed() -> str:
    """Return the evaluation tasks with a line of help each."""
    from fedspeed.evaluation.config import EVAL_TASKS
    from fedspeed.evaluation.presets import PRESETS

    helps = {name: entry.help for name, entry in EVAL_TASKS.items()}
    helps |= {f"--preset {name}": preset.help for name, preset in PRESETS.items()}
    width = max(map(len, helps))
    return "\n".join(f"{name.ljust(width)}  {line}" for name, line in helps.items())


def _compare(arguments: argparse.Namespace) -> int:
    """Print the results of several runs as a table, and draw them with --plot; return the exit code."""
    from fedspeed.evaluation.compare_runs import comparison_figure, comparison_text, read_model
    from fedspeed.files import write_atomically
    from fedspeed.monitor.plots import png

    if not arguments.overrides:
        raise ConfigError("eval compare: name at least one run, or file of results")
    models = [read_model(name) for name in arguments.overrides]
    print_result(comparison_text(models))
    if arguments.plot:
        try:
            write_atomically(arguments.plot, png(comparison_figure(models)))
        except OSError as error:
            raise ConfigError(
                f"{arguments.plot}: cannot be written ({error.strerror}); choose another place"
            ) from error
    return EXIT_OK


def _write_helm(arguments: argparse.Namespace) -> int:
    """Write the files for crfm-helm; return the exit code."""
    from fedspeed.evaluation.helm import write_helm

    try:
        written = write_helm(arguments.helm, arguments.target)
    except OSError as error:
        raise ConfigError(
            f"{arguments.helm}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    print_result("\n".join(str(path) for path in written))
    return EXIT_OK


def _request(arguments: argparse.Namespace) -> "EvalRequest":
    """Return what the arguments ask for.

    Raises:
        FedSpeedError: there is no such target, or an override is wrong.
    """
    from fedspeed.evaluation.presets import preset_of
    from fedspeed.session.eval_request import EvalRequest, default_tasks
    from fedspeed.session.eval_target import resolve_target

    target = resolve_target(arguments.target, arguments.overrides)
    presets = [preset_of(name) for name in _names(arguments.preset)]
    names = [*_names(arguments.tasks), *(name for preset in presets for name in preset.tasks)]
    harness = [*_names(arguments.lm_eval), *(name for preset in presets for name in preset.harness)]
    return EvalRequest(
        target=target,
        tasks=tuple(names) if names or harness else default_tasks(target, arguments.held_out),
        harness=tuple(harness),
        num_fewshot=arguments.num_fewshot,
        chat=arguments.chat_template,
        presets=_names(arguments.preset),
        out=arguments.out or target.results,
        limit=arguments.limit or 0,
        samples=arguments.samples or 0,
        sampling={
            name: value
            for name, value in (("temperature", arguments.temperature), ("top_p", arguments.top_p))
            if value is not None
        },
        held_out=arguments.held_out,
        answers=arguments.save_answers,
        unsafe=arguments.unsafe,
    )


def _names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _run_local(request: "EvalRequest", arguments: argparse.Namespace) -> int:
    """Check the request, and start the local ranks under a supervisor."""
    # numpy is imported next, and ranks are forked from this process's children: its threads would not
    # survive.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from fedspeed.cluster.devices import choose_accelerator
    from fedspeed.cluster.local import END_S, run_local
    from fedspeed.cluster.local_ranks import local_rank_count
    from fedspeed.session.components import preload
    from fedspeed.session.eval_request import check_request
    from fedspeed.session.preflight import check_files

    check_files(request.target.loaded)
    check_request(request)
    choose_accelerator(os.environ)
    ended = run_local(
        sys.argv[1:],
        local_rank_count(request.target.config.cluster.local_ranks, clients=1),
        os.environ,
        max_restarts=0,
        last_round=None,
        preload=preload,
        target=lambda env: _rank(request, arguments, env),
        finish_s=END_S,  # there is no round to finish
    )
    return ended.exit_code


def _rank(request: "EvalRequest", arguments: argparse.Namespace, env: Mapping[str, str] | None = None) -> int:
    """Evaluate as one rank; return its exit code.

    Args:
        env: changes to the environment, if the process was forked rather than started.
    """
    json_out = prepare_rank(env, as_json=arguments.json)
    code = report_ending(_ending(request, json_out), json_out)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _ending(request: "EvalRequest", json_out: TextIO | None) -> Ending:
    """Evaluate as one rank, and return how it ended."""
    from fedspeed.session.eval_rank import run_eval_rank

    try:
        return run_eval_rank(request, json_out)
    except ModuleNotFoundError as error:
        return error_ending(missing_package(error))
    except Exception as error:
        return error_ending(error)

"""The command line.

Only commands that load a model import the heavy libraries: `--help`, `--print-config`, `plan`, `simulate` and
`doctor` do without torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fedspeed import __version__
from fedspeed.cli import (
    audit,
    bench,
    chat,
    config_reference,
    data,
    doctor,
    evaluate,
    export,
    import_base,
    init,
    keys,
    plan,
    pretrain_base,
    probe,
    run,
    simulate,
)
from fedspeed.cli.output import print_error_as_json, report_ending
from fedspeed.cli.packages import missing_package
from fedspeed.errors import ConfigError, FedSpeedError
from fedspeed.session.ending import error_ending

# In the order of --help.
COMMANDS = (
    run,
    init,
    data,
    chat,
    evaluate,
    export,
    doctor,
    plan,
    simulate,
    probe,
    bench,
    audit,
    keys,
    import_base,
    pretrain_base,
    config_reference,
)


def main(argv: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    _Parser.as_json = "--json" in argv
    arguments = _arguments(argv)
    json_out = sys.stdout if getattr(arguments, "json", False) else None
    # torch would warn at every poll of a store.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        _check_overrides(arguments)
        return arguments.command(arguments)
    except FedSpeedError as error:
        return report_ending(error_ending(error), json_out)
    except ModuleNotFoundError as error:
        return report_ending(error_ending(missing_package(error)), json_out)
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Reports unknown arguments as all bad input is reported: with `--json` as an object too."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        if self.as_json:
            print_error_as_json(ConfigError(message), sys.stdout)
        super().error(message)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    argparse accepts positional arguments in one place only, but `a=1 --json b=2` has overrides in two. A
    command with `passed_on` gets all of them as they are.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "passed_on"):
        arguments.passed_on = list(argv[1:])
        return arguments
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if rest and not unknown:
        arguments.overrides += rest
    if unknown:
        problems = [f"unrecognized arguments: {' '.join(unknown)}", *_configuration_problems(arguments, rest)]
        parser.error("\n  - ".join(problems))
    return arguments


def _check_overrides(arguments: argparse.Namespace) -> None:
    """Refuse a command line that gives a key twice, together with all other faults of the configuration.

    Raises:
        ConfigError: a key is given twice.
    """
    overrides = getattr(arguments, "overrides", [])
    if len(overrides) < 2:
        return
    from fedspeed.config.load import repeated_keys

    if repeated := repeated_keys(overrides):
        raise ConfigError([*repeated, *_configuration_problems(arguments, [])])


def _configuration_problems(arguments: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Return the faults of a command's configuration, to report them with those of its arguments.

    Args:
        rest: arguments that argparse did not recognise, overrides among them.
    """
    if getattr(arguments, "config", None) is None or not hasattr(arguments, "overrides"):
        return []
    from fedspeed.config.load import load

    overrides = [*arguments.overrides, *(word for word in rest if not word.startswith("-"))]
    try:
        load(arguments.config, overrides)
    except ConfigError as error:
        return error.problems
    return []


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fedspeed", description="Federated fine-tuning of language models on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"fedspeed {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser

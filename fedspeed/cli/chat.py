"""`fedspeed chat`: answer instructions with the model of a finished run."""

import argparse
import sys
from collections.abc import Iterator

from fedspeed.cli.arguments import Commands, positive, temperature
from fedspeed.cli.output import print_result
from fedspeed.cli.packages import need_packages
from fedspeed.errors import EXIT_OK, FedSpeedError
from fedspeed.log import LOG

MAX_NEW_TOKENS = 256


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "chat",
        help="ask what a finished run has trained",
        description="Answer one line, or each line of standard input, by the model of a finished run: with "
        "the prompt, the tokenizer "
        "and the numeric type that it was trained with.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="name of a run in runs/, its folder, or an exported adapter/ or model/"
    )
    parser.add_argument(
        "text", nargs="?", help="the instruction (default: each line of standard input is one)"
    )
    parser.add_argument("--input", default="", help="what stands in the prompt's input part")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="of sampling; 0, the default, takes the most likely token",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Answer the instruction, or each line of standard input."""
    from fedspeed.data.rows import Row
    from fedspeed.session.chat import answer, exported_folder, load, own_models_note

    folder = exported_folder(arguments.run)
    if note := own_models_note(folder):
        LOG.info(note)
    need_packages()
    from fedspeed.monitor.activity_line import ActivityLine

    with ActivityLine():
        loaded = load(folder)
    for text in [arguments.text] if arguments.text is not None else _lines():
        if not text.strip():
            raise FedSpeedError("there is nothing to answer; give an instruction, or lines on standard input")
        print_result(
            answer(
                loaded, Row(text, arguments.input, "", ""), arguments.max_new_tokens, arguments.temperature
            )
        )
    return EXIT_OK


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not blank; an empty one if there are none."""
    yielded = False
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            break
        if line.strip():
            yielded = True
            yield line.rstrip("\n")
    if not yielded and not sys.stdin.isatty():
        yield ""

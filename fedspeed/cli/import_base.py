"""`fedspeed import-base`: make a folder that FedSpeed reads of a model in another format."""

import argparse

from fedspeed.cli.arguments import Commands, file_name
from fedspeed.cli.output import print_result
from fedspeed.cli.packages import need_packages
from fedspeed.errors import EXIT_OK


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    parser = commands.add_parser(
        "import-base",
        help="make a base of a GGUF file, of a quantised checkpoint (fp8, GPTQ, AWQ), or of any other model",
        description="Write a model as a folder for model.base: plain safetensors, tokenizer, chat template, "
        "and a file that says where it came from. Quantised weights are dequantised. The folder appears once "
        "all weights are checked, the engine has loaded them and the model has answered a question.",
    )
    parser.add_argument(
        "source",
        metavar="NAME|FOLDER|FILE.gguf",
        help="a hub name, the folder of a Hugging Face model, or a GGUF file",
    )
    parser.add_argument("--out", type=file_name, required=True, metavar="FOLDER", help="where to write it")
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="numeric type to store it in (default auto: as it is stored; dequantised weights as its "
        "config.json says, of a GGUF file bf16)",
    )
    parser.add_argument(
        "--origin", default="", metavar="TEXT", help="where you got it, for model cards of what is trained"
    )
    parser.add_argument(
        "--no-answer", action="store_true", help="do not load it and ask it, for lack of memory"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Import the model and print what it is and what it answers."""
    need_packages()
    from fedspeed.monitor.activity_line import ActivityLine
    from fedspeed.session.import_base import import_base

    with ActivityLine():
        lines = import_base(
            arguments.source,
            arguments.out,
            arguments.dtype,
            origin=arguments.origin,
            ask=not arguments.no_answer,
        )
    print_result("\n".join(lines))
    return EXIT_OK

"""Runs the campaign: python -m benchmarks.gpu [--dry] [--list first|second] [--out FOLDER] [PHASE ...]"""

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu.phases import EVERY, LISTS, Phase, chosen
from benchmarks.gpu.record import end_as
from benchmarks.gpu.report import read, summary
from benchmarks.gpu.runner import run_phase
from fedspeed.files import write_atomically


def main() -> int:
    """Run the phases one after another; 0 if none has failed."""
    args = arguments()
    # Set before anything imports DeepSpeed or torch, here and in the phases.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if args.dry:
        # Blocks are not really compiled: a processor takes longer over that than over all the rest.
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")
        import_libraries()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # phases are ended on the way out
    try:
        run_all(args)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {args.out}", file=sys.stderr)
        return 128 + signal.SIGINT
    phases = read(args.out, [phase.name for phase in args.phases])
    print(summary(phases))
    return int(any(has_failed(phase["status"]) for phase in phases))


def has_failed(status: str) -> bool:
    """Whether a phase has ended otherwise than by its own end or for lack of time."""
    return status != "finished" and not status.startswith("left out")


def run_all(args: argparse.Namespace) -> None:
    """Run the phases. The page of results is written anew after each: it is there should this be killed."""
    begin = time.monotonic()
    failed = ""  # a phase without which nothing is worth the card's time
    for phase in args.phases:
        left_s = args.seconds - (time.monotonic() - begin) if args.seconds else math.inf
        if failed:
            leave_out(args.out, phase, f"{failed} failed; mend that first, or name this phase alone")
        elif left_s <= 0:
            leave_out(args.out, phase, f"the {args.seconds:.0f} s of --seconds were over")
        else:
            try:
                run_phase(phase, args.out, args.dry, min(60 * phase.minutes, left_s))
            finally:
                write_summary(args)
        (found,) = read(args.out, [phase.name])
        if phase.guards and has_failed(found["status"]) and left_s > 60 * phase.minutes:
            failed = phase.name
        write_summary(args)


def write_summary(args: argparse.Namespace) -> None:
    """Write the page of what there is."""
    phases = read(args.out, [phase.name for phase in args.phases])
    write_atomically(args.out / "summary.md", summary(phases).encode())


def leave_out(out: Path, phase: Phase, why: str) -> None:
    """Say in a phase's file why it was not begun."""
    path = out / f"{phase.name}.json"
    path.unlink(missing_ok=True)  # of an earlier campaign
    end_as(path, phase.name, f"left out: {why}")


def arguments() -> argparse.Namespace:
    """Parse the command line; `phases` becomes the list of chosen phases."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure FedSpeed on one GPU, phase by phase."
    )
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"which ones: {', '.join(EVERY)}")
    parser.add_argument(
        "--list", choices=tuple(LISTS), default="", help="the phases of a list (default: first)"
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="on the CPU in tiny shapes, to find mistakes; all phases unless some are named",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-campaign"), help="folder of the results")
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=0.0,
        help="for all phases together; 0: as long as their limits allow",
    )
    args = parser.parse_args()
    if args.phases and args.list:
        parser.error(f"--list={args.list} and names of phases ({', '.join(args.phases)}): give one of them")
    try:
        args.phases = chosen(args.phases, args.list, args.dry)
    except ValueError as error:
        parser.error(str(error))
    if not args.dry:
        check_card(parser)
    args.out = args.out.absolute()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out={args.out}: cannot be a folder of results ({error.strerror}); name another one")
    return args


def seconds(text: str) -> float:
    """Parse a number of seconds, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return value


def check_card(parser: argparse.ArgumentParser) -> None:
    """End with what to do where there is no card to compute on. Without torch: this process imports none."""
    from fedspeed.cluster.devices import visible_gpus

    asked = os.environ.get("DS_ACCELERATOR", "cuda")
    if asked != "cuda":
        parser.error(f"DS_ACCELERATOR={asked}: the campaign measures a card; unset it, or add --dry")
    if not visible_gpus(os.environ):
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        parser.error(
            f"no GPU is visible (CUDA_VISIBLE_DEVICES={'unset' if chosen is None else chosen}); "
            "start it where there is one, or add --dry"
        )


def import_libraries() -> None:
    """Import once what the forked phases of a dry run share."""
    from fedspeed.session.components import preload

    preload()
    import deepspeed.runtime.zero.stage3  # noqa: F401
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import fedspeed.engine.stock  # noqa: F401
    import fedspeed.engine.streamed  # noqa: F401
    import fedspeed.session.rank  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())

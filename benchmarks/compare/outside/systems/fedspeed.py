"""FedSpeed, and the plain loop that its losses and those of all others are held against."""

from benchmarks.compare.outside.system import Site, System, Variant, module_command
from benchmarks.compare.outside.task import ALONE, FEDERATION, config_path


def run(task: str, ranks: int, threads: int, base: str, *overrides: str):
    """Return the command of a run, as a function of the site."""

    def command(site: Site) -> list[str]:
        return [
            str(site.python),
            "launch.py",
            "--config",
            str(config_path(site.folder, task)),
            "--json",
            f"run.out={site.scratch}",
            "run.name=run",
            f"cluster.local_ranks={ranks}",
            f"engine.threads={threads}",
            f"deepspeed.base={base}",
            *overrides,
        ]

    return command


def plain(task: str):
    """Return the command of the plain loop, as a function of the site."""
    return lambda site: module_command(site, "task", task, site.folder)


PLAIN = System(
    "plain",
    "torch",
    (
        Variant("plain PyTorch loop", plain(FEDERATION), reference=True),
        Variant("plain PyTorch loop, one client", plain(ALONE), ALONE, reference=True),
    ),
)
FEDSPEED = System(
    "fedspeed",
    "deepspeed",
    (
        Variant("FedSpeed, ZeRO-0", run(FEDERATION, 3, 1, "zero0.json")),
        Variant("FedSpeed, ZeRO-0, one rank", run(FEDERATION, 1, 2, "zero0.json")),
        Variant("FedSpeed, ZeRO-3", run(FEDERATION, 3, 1, "zero3.json")),
    ),
)
OFFLOAD = ("zero3_offload.json", "engine.tier=stock")
RAM = ("zero3.json", "engine.tier=ram")
FEDSPEED_ALONE = System(
    "fedspeed-one-client",
    "deepspeed",
    (
        Variant("FedSpeed, stock ZeRO-3 offload, 1 rank", run(ALONE, 1, 2, *OFFLOAD), ALONE),
        Variant(
            "FedSpeed, stock ZeRO-3 offload, 2 ranks",
            run(ALONE, 2, 1, *OFFLOAD, "train.micro_batch=2"),
            ALONE,
        ),
        Variant("FedSpeed, tier=ram, 1 rank", run(ALONE, 1, 2, *RAM), ALONE),
        Variant("FedSpeed, tier=ram, 2 ranks", run(ALONE, 2, 1, *RAM, "train.micro_batch=2"), ALONE),
    ),
)

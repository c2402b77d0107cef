"""What a comparison needs before its first run: base, public rows, the list of runs, and what is there."""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare.measured.arms import PUBLIC, Arm, arguments_of, merged, shared_config
from benchmarks.compare.measured.command import QUICK, QUICK_BASE, QUICK_BLOCKS
from benchmarks.compare.measured.records import Bench, Run, Setting, read
from benchmarks.compare.results import ROOT, machine
from fedspeed.config.load import load
from fedspeed.config.run import RunConfig
from fedspeed.errors import ConfigError

PUBLIC_ROWS = 200
PUBLIC_SEED = 1_000_003  # of built-in rows; no run has it


def more_settings(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return settings by name from the arguments NAME:key=value of --set.

    Raises:
        ConfigError: an argument has another form.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        name, colon, setting = text.partition(":")
        if not (name and colon and "=" in setting):
            raise ConfigError(f"--set {text}: write NAME:key=value, such as fs_llm:train.lr=0.01")
        found.setdefault(name, []).append(setting)
    return found


def prepared(
    arguments: argparse.Namespace, arms: Sequence[Arm]
) -> tuple[Bench, list[tuple[Arm, int, tuple[str, ...]]]]:
    """Return the comparison with the runs that are there already, and those that are missing, interleaved: a
    seed after the other, and with each seed all arms in turn.

    Raises:
        ConfigError: the configuration is wrong, or of an arm.
    """
    overrides = merged(QUICK if arguments.quick else (), arguments.overrides)
    if arguments.ranks:
        overrides = merged(overrides, (f"cluster.local_ranks={arguments.ranks}",))
    if arguments.quick and "model.base" not in {text.partition("=")[0] for text in arguments.overrides}:
        _pretrain()
    config = shared_config(arguments.config, overrides)
    if any(arm.public_rows for arm in arms) and not any(text.startswith(f"{PUBLIC}=") for text in overrides):
        overrides = merged(overrides, (f"{PUBLIC}={_public_rows(config, arguments.out)}",))
    plan = [
        (arm, seed, arguments_of(arm, arguments.config, overrides, seed))
        for seed in arguments.seeds
        for arm in arms
    ]
    for arm, _, settings in plan[: len(arms)]:
        load(arguments.config, settings)
    setting = _setting(arguments, config, overrides, arms)
    bench = Bench(
        date=time.strftime("%Y-%m-%d"),
        machine=machine(),
        setting=setting,
        runs=_kept(arguments.out / "bench.json", plan, setting.digest),
    )
    done = {(run.arm, run.seed) for run in bench.runs}
    return bench, [entry for entry in plan if (entry[0].name, entry[1]) not in done]


def _setting(
    arguments: argparse.Namespace, config: RunConfig, overrides: Sequence[str], arms: Sequence[Arm]
) -> Setting:
    from fedspeed.models.catalogue import shape_of

    return Setting(
        config=str(arguments.config),
        digest=hashlib.sha256(arguments.config.read_bytes()).hexdigest(),
        model=Path(config.model.base).name,
        parameters=shape_of(config.model.base).total,
        clients=config.data.clients,
        overrides=tuple(overrides),
        arms={arm.name: arm.title for arm in arms},
        cap_gib=arguments.cap,
        target=arguments.target,
    )


def _kept(path: Path, plan: Sequence[tuple[Arm, int, tuple[str, ...]]], digest: str) -> tuple[Run, ...]:
    """Return the finished runs of an earlier command that this one would repeat: of the same arguments, with
    a configuration file of the same content.
    """
    if not path.is_file():
        return ()
    wanted = {(arm.name, seed): settings for arm, seed, settings in plan}
    kept = read(path)
    if kept.setting.digest != digest:
        return ()
    return tuple(
        run
        for run in kept.runs
        if run.status == "finished" and wanted.get((run.arm, run.seed)) == run.arguments
    )


def _pretrain() -> None:
    from fedspeed.quickstart import pretrain

    pretrain(ROOT / QUICK_BASE, 0, blocks=QUICK_BLOCKS)


def _public_rows(config: RunConfig, out: Path) -> Path:
    """Write the rows that a method's server trains on, in the form of the clients' rows, and return the file.

    Raises:
        ConfigError: the task has no rows that clients do not have.
    """
    from fedspeed.data.builtin import builtin_rows

    if config.data.task != "builtin":
        raise ConfigError(
            f"data.task={config.data.task}: name rows for the method's server that no client has: "
            "federation.public_rows=FILE"
        )
    path = out / "public-rows.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = builtin_rows(PUBLIC_SEED, PUBLIC_ROWS)
    names = ("instruction", "input", "output", "category")
    lines = [json.dumps({name: getattr(row, name) for name in names}) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path

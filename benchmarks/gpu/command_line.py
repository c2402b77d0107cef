"""Whole runs through the command line: the quickstart, and three organisations that sum masked updates on
one card.
"""

import json
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path

from benchmarks.gpu.engines import Scene
from fedspeed.net.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "ds_configs" / "quickstart.yaml"
BASE = ROOT / "runs" / "quickstart-base"
SITES = ("north", "east", "south")
ROWS = 900
# A base of drawn weights and one step tell whether a run goes through; pretraining one would take longer than
# all phases of a dry run.
DRY_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
DRY_FIELDS = (
    "model.init=random",
    "train.local_steps=1",
    "federation.rounds=1",
    "federation.compare_alone=false",
    "data.max_rows=60",
    "train.micro_batch=2",
)


def quickstart(scene: Scene) -> None:
    """Run the quickstart's configuration on one rank."""
    with scene.record.guarded("quickstart"):
        fields = [*common(scene), "run.name=quickstart", "cluster.local_ranks=1"]
        begin = time.monotonic()
        run = start(scene, QUICKSTART, fields, "quickstart")
        finish(scene, {"quickstart": run})
        scene.record.note(
            "quickstart", {"s in all": round(time.monotonic() - begin, 1)} | last_round(scene, "quickstart")
        )


def masked(scene: Scene) -> None:
    """Let three organisations, a process and a rank each, train together: nobody sees another's update."""
    with scene.record.guarded("masked"):
        folder = prepare_sites(scene)
        begin = time.monotonic()
        runs = {
            name: start(scene, site_config(number), site_fields(scene, folder, name), name)
            for number, name in enumerate(SITES, 1)
        }
        finish(scene, runs)
        found = {"s in all": round(time.monotonic() - begin, 1)} | last_round(scene, SITES[0])
        scene.record.note("masked", found)
        others = [last_round(scene, name) for name in SITES[1:]]
        if any(other["held-out loss"] != found["held-out loss"] for other in others):
            raise RuntimeError("the organisations ended with different held-out losses")


def common(scene: Scene) -> list[str]:
    """Return the configuration overrides that all runs of a phase have in common.

    Raises:
        FileNotFoundError: there is no base to start from.
    """
    fields = [f"run.out={scene.out / 'runs'}"]
    if scene.dry:
        base = scene.folder / "base"
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text(json.dumps(DRY_MODEL))
        return [*fields, f"model.base={base}", *DRY_FIELDS]
    if not (BASE / "config.json").is_file():
        raise FileNotFoundError(
            f"{BASE}: there is no base; make it on any machine with `python -m fedspeed pretrain-base "
            f"{BASE.relative_to(ROOT)}` and bring it along"
        )
    return [*fields, f"model.base={BASE}"]


def site_config(number: int) -> Path:
    """Return the shipped configuration of an organisation."""
    return ROOT / "ds_configs" / "organisations" / f"client{number}.yaml"


def site_fields(scene: Scene, folder: Path, name: str) -> list[str]:
    """Return the overrides of one site."""
    return [
        *common(scene),
        f"data.path={folder / f'{name}.jsonl'}",
        f"routing.identity={folder / f'{name}.key'}",
        f"routing.roster={folder / 'roster.json'}",
        f"routing.roster_signer={folder / 'operator.json'}",
        f"run.name={name}",
    ]


def prepare_sites(scene: Scene) -> Path:
    """Make keys, a roster and rows of their own for all sites; the folder they lie in."""
    from fedspeed.data.builtin import builtin_rows
    from fedspeed.routing import identity

    folder = scene.folder / "organisations"
    folder.mkdir()
    for name in (*SITES, "operator"):
        identity.make(name, f"127.0.0.1:{free_port()}", folder)
    members = [identity.read_card(folder / f"{name}.json") for name in SITES]
    signer = identity.read_key(folder / "operator.key")
    (folder / "roster.json").write_text(identity.sign_roster(members, signer, epoch=1))
    rows = list(builtin_rows(7, ROWS))
    kinds = sorted({row.category for row in rows})
    for number, name in enumerate(SITES):
        own = [row for row in rows if kinds.index(row.category) % len(SITES) == number]
        lines = [
            json.dumps({"instruction": row.instruction, "input": row.input, "output": row.output})
            for row in own
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def start(scene: Scene, config: Path, fields: list[str], name: str):
    """Start a run, as a process of its own; what it says goes to a file beside the results."""
    said = scene.out / f"{scene.phase.name}-{name}.log"
    arguments = ["launch.py", "--config", str(config), "--fresh", *fields]
    target = _fork if scene.dry else _command
    process = multiprocessing.get_context("fork").Process(target=target, args=(arguments, said), name=name)
    process.start()
    return process


def _command(arguments: list[str], said: Path) -> None:
    """Become what a user types."""
    _speak_into(said)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, "PYTHONPATH": path})


def _fork(arguments: list[str], said: Path) -> None:
    """Become the one rank of a launcher, in this process that has imported the libraries."""
    _speak_into(said)
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    sys.argv[:] = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _speak_into(said: Path) -> None:
    os.chdir(ROOT)
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def finish(scene: Scene, runs: dict) -> None:
    """Wait for runs to end.

    Raises:
        RuntimeError: one has failed.
    """
    for name, run in runs.items():
        run.join()
        if run.exitcode:
            said = (scene.out / f"{scene.phase.name}-{name}.log").read_text(errors="replace")
            raise RuntimeError(f"the run {name} ended with {run.exitcode}: {said[-400:]}")


def last_round(scene: Scene, name: str) -> dict:
    """Return the record of a run's last round."""
    lines = (scene.out / "runs" / name / "rounds.jsonl").read_text().splitlines()
    last = [record for record in map(json.loads, lines) if "val_loss" in record][-1]
    return {
        "round": last["round"],
        "held-out loss": round(last["val_loss"], 5),
        "s a round": round(last["seconds"], 2),
        "answer tokens/s": round(last["tokens_per_s"]),
    }

"""A mistake that a user makes, and functions that write the files for it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.run.launched import LLAMA
from tests.tiny import write_llama


def nothing(here: Path) -> None:
    """Write nothing: the mistake needs no file."""


@dataclass(frozen=True)
class Mistake:
    """A command line, and what its refusal says.

    Attributes:
        arguments: behind `fedspeed`; for `run`, the configuration in the working folder comes by itself.
        says: texts that stand in the message, all of them: what is wrong, where, and what to do.
        files: makes the files that the mistake is about, in the working folder.
        dry: found by `--dry-run` only, and else by the ranks: it takes the libraries that they load.
    """

    arguments: str
    says: tuple[str, ...]
    files: Callable[[Path], object] = nothing
    dry: bool = False


def written(name: str, text: str | bytes) -> Callable[[Path], object]:
    """Return a function that writes a file with this content."""
    return lambda here: (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def rows(name: str, items: list) -> Callable[[Path], object]:
    """Return a function that writes a file of rows, one JSON object a line."""
    return written(name, "".join(json.dumps(item) + "\n" for item in items))


def model(
    name: str, config: dict | str | None, weights: dict | None = None, **files: str
) -> Callable[[Path], object]:
    """Return a function that writes a model folder: config.json, and weights if given. `a__b` among `files`
    stands for the file a.b.
    """

    def make(here: Path) -> None:
        folder = here / name
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if weights is not None:
            save_file(weights, folder / "model.safetensors")
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)

    return make


def changed_llama(name: str, **changes) -> Callable[[Path], object]:
    """Return a function that writes a complete model folder and then changes its config.json."""

    def make(here: Path) -> None:
        folder = Path(write_llama(here / name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return make


def in_eight_bits(name: str) -> Callable[[Path], object]:
    """Return a function that writes a model folder with one weight stored as 8-bit integers."""

    def make(here: Path) -> None:
        weights = Path(write_llama(here / name)) / "model.safetensors"
        save_file(load_file(weights) | {"model.norm.weight": np.ones(64, np.int8)}, weights)

    return make


def cut(name: str, left: int) -> Callable[[Path], object]:
    """Return a function that writes a model folder with truncated weights."""

    def make(here: Path) -> None:
        model(name, LLAMA, {"model.norm.weight": np.ones(64, np.float32)})(here)
        path = here / name / "model.safetensors"
        os.truncate(path, left if left > 0 else path.stat().st_size + left)

    return make


def saved_adapter(
    name: str, module: str = "model.layers.0.self_attn.q_proj", **config
) -> Callable[[Path], object]:
    """Return a function that writes a PEFT folder with the LoRA factors of one matrix of 64 x 64."""

    def make(here: Path) -> None:
        folder = here / name
        folder.mkdir()
        known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [module.rpartition(".")[2]]}
        (folder / "adapter_config.json").write_text(json.dumps(known | config))
        shapes = {"A": (4, 64), "B": (64, 4)}
        save_file(
            {
                f"base_model.model.{module}.lora_{factor}.weight": np.ones(shape, np.float32)
                for factor, shape in shapes.items()
            },
            folder / "adapter_model.safetensors",
        )

    return make


def pickled_adapter(name: str) -> Callable[[Path], object]:
    """Return a function that writes a PEFT folder as older trainers leave it, with pickled weights."""

    def make(here: Path) -> None:
        saved_adapter(name)(here)
        (here / name / "adapter_model.safetensors").rename(here / name / "adapter_model.bin")
        for file in ("_base.bin", "optimizer.pt", "training_args.bin"):
            (here / name / file).write_text("")

    return make

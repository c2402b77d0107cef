"""Check the base that a configuration names, before anything is started and without torch."""

from pathlib import Path

from fedspeed.config.load import Loaded
from fedspeed.config.run import RunConfig
from fedspeed.errors import ModelError
from fedspeed.hub_names import is_hub_name
from fedspeed.models.base_files import check_base
from fedspeed.models.catalogue import shape_of
from fedspeed.models.families.registry import family_of
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.hub import check_hub
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import local_folder
from fedspeed.models.positions import check_length
from fedspeed.models.quantisation import import_command

SMOLLM2_BASE = "runs/smollm2-135m"
QUICKSTART_BASE = "runs/quickstart-base"  # pretrained on the spot where it is missing


def check_model(loaded: Loaded) -> list[str]:
    """Check the base. Return the lines to print about it.

    Raises:
        ModelError: it cannot be trained, or not with rows of this length.
    """
    config = loaded.config
    return _base(loaded) + [
        f"note     {text}" for text in check_length(config.model.base, config.data.max_tokens)
    ]


def _base(loaded: Loaded) -> list[str]:
    model = loaded.config.model
    if model.base == QUICKSTART_BASE and not Path(model.base).exists():
        return [f"model    {model.base}, pretrained on the spot when the run starts"]
    folder = local_base(loaded.config)
    if folder is None:
        if is_hub_name(model.base):
            check_hub(model.base, model.init == "pretrained")
            return [f"model    {model.base}, to be downloaded from the hub when the run starts"]
        remedy = "give a folder with config.json, or a hub name such as org/model"
        if model.base.endswith(SMOLLM2_BASE):
            remedy = f"`bash launchers/fetch-smollm2.sh` makes it, or {remedy}"
        raise ModelError(f"model.base: {model.base} does not exist{loaded.searched('model.base')}; {remedy}")
    if Path(model.base).is_file() and Path(model.base).name != "config.json":
        remedy = "give the folder it is in, or the config.json there"
        if model.base.lower().endswith(".gguf"):
            remedy = f"make a folder of it with `{import_command(model.base)}` and give that"
        raise ModelError(f"model.base: {model.base} is a file; {remedy}")
    config = folder / "config.json"
    kind = family_of(read_object(config, "a model configuration").get("model_type"), str(config)).model_type
    if model.init == "random":
        drawn = f"model    {folder} ({kind}, weights drawn from run.seed)"
        return [drawn, *_experts(shape_of(str(folder)))]
    shape, stored, texts = check_base(folder)
    files = {tensor.file for tensor in stored.values()}
    return [
        f"model    {folder} ({kind}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB in "
        f"{len(files)} file(s))",
        *_experts(shape),
        *(f"note     {text}" for text in texts),
    ]


def _experts(shape: ModelShape) -> list[str]:
    """Return a line with the parameters of a mixture of experts, none for another model."""
    return [f"note     {shape.size_text}"] if shape.experts else []


def weight_notes(config: RunConfig) -> list[str]:
    """Return notes on the files of a base that is on this machine."""
    base = local_base(config)
    return check_base(base)[2] if base is not None and config.model.init == "pretrained" else []


def local_base(config: RunConfig) -> Path | None:
    """Return the base's folder; None for a hub name that is not in the cache, and for the quickstart's base
    before it is pretrained.
    """
    return local_folder(
        config.model.base, config.model.init == "pretrained", config.model.tokenizer == "auto"
    )

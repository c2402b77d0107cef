"""`fedspeed export`: a folder of a trained model for others, an adapter or merged with its base."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspeed import activity
from fedspeed.checkpoint.card import CARD_FILE, Card, card_values, read_card, read_facts
from fedspeed.checkpoint.export import GENERATION_FILE, put_in_place, with_special_tokens
from fedspeed.checkpoint.merge import MergedTensors, write_merged
from fedspeed.data.config import DataConfig
from fedspeed.data.prompt_format import format_of
from fedspeed.data.prompt_template import template_for
from fedspeed.errors import FedSpeedError, ModelError
from fedspeed.evaluation.results import read_results, scores_to_markdown
from fedspeed.files import check_writable, follow_umask
from fedspeed.models.file_digests import weights_digest
from fedspeed.models.hub import model_folder
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import MORE_TOKENIZER_FILES, TOKENIZER_FILES
from fedspeed.models.numeric_types import TORCH_NAMES
from fedspeed.models.provenance import origin_text, provenance_of, public_name
from fedspeed.models.quantisation import import_command
from fedspeed.models.saved_adapter import CONFIG_FILE
from fedspeed.session.base_of_adapter import find_base, run_config
from fedspeed.session.chat import exported_folder, own_models_note
from fedspeed.session.eval_target import results_name

MARK = "fedspeed_export.json"  # in every folder that this command wrote, which it may replace


@dataclass(frozen=True)
class Trained:
    """A folder that a run has exported, with what its run's folder says of it.

    Attributes:
        folder: adapter/ or model/ of the run. adapted: whether it is an adapter.
        base: on this machine, or a hub name; what it was trained from. public: its hub name, or empty.
        tokenizer: of transformers, with the chat template that was trained with. config: of the run.
    """

    folder: Path
    adapted: bool
    base: str
    public: str
    tokenizer: Any
    config: dict

    @property
    def base_for_others(self) -> str:
        """The name of the base on any machine: its hub name, or the name of its folder."""
        return self.public or Path(self.base).name


def export_run(name: str, *, merged: bool, out: Path | None, dtype: str) -> list[str]:
    """Write a trained model for others; return lines to print.

    Args:
        name: of a run, its folder, or an exported folder.
        merged: whether an adapter is merged into its base.
        out: None: a folder in the run's folder. dtype: of a merged model.

    Raises:
        FedSpeedError: the run has not finished, `out` is another folder, or the base is not there.
    """
    trained = _trained(exported_folder(name))
    if trained.adapted and merged and trained.config.get("model", {}).get("init") == "random":
        raise ModelError(
            f"{trained.folder}: its base's weights were drawn at random for the run and are in no file, so "
            "that there is nothing to merge the adapter into; train with adapter.method=full"
        )
    whole = merged or not trained.adapted
    default = trained.folder.with_name(_default_name(trained.folder.name, merged))
    target = (out or default).absolute()
    with _replaced(target) as draft:
        if whole:
            _write_model(trained, draft, dtype)
        else:
            _write_adapter(trained, draft)
        _copy(trained.folder, draft, (*TOKENIZER_FILES, *MORE_TOKENIZER_FILES))
        obtain = "" if whole or trained.public else _obtain(trained)
        card = _card(trained, dtype if whole else "", obtain)
        (draft / CARD_FILE).write_text(card.text(), encoding="utf-8")
        follow_umask(draft)
    lines = [f"{'model' if whole else 'adapter':<8} {target}"]
    if obtain:
        lines.append(
            f"note     its base {trained.base} has no public name: whoever loads the adapter needs a folder "
            f"`{trained.base_for_others}`, see {CARD_FILE}"
        )
    if note := own_models_note(trained.folder):
        lines.append(f"note     {note}")
    return lines


def _default_name(name: str, merged: bool) -> str:
    kind = "merged" if merged else "export"
    return kind if name in ("adapter", "model") else f"{name}-{kind}"


def _trained(folder: Path) -> Trained:
    from transformers import AutoTokenizer

    adapted = (folder / CONFIG_FILE).is_file()
    config = run_config(folder.parent)
    base = str(config.get("model", {}).get("base", ""))
    if adapted:
        named = read_object(folder / CONFIG_FILE, "an adapter configuration").get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise ModelError(f"{folder / CONFIG_FILE}: does not name its base; export it from its run")
        base = find_base(named, folder)
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise ModelError(f"{folder / CONFIG_FILE}: its base {base} is not there; bring it back")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Trained(folder, adapted, base, public=public_name(base), tokenizer=tokenizer, config=config)


def _write_model(trained: Trained, draft: Path, dtype: str) -> None:
    base = model_folder(trained.base) if trained.adapted else trained.folder
    tensors = MergedTensors(base, trained.folder if trained.adapted else None)
    values = read_object(base / "config.json", "a model configuration")
    values = write_merged(draft, tensors, values, dtype)
    (draft / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    generation = _generation(base / GENERATION_FILE, trained)
    (draft / GENERATION_FILE).write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")


def _generation(path: Path, trained: Trained) -> dict:
    """Return the content of generation_config.json: the base's, with the tokens that end an answer."""
    values = read_object(path, "a generation configuration") if path.is_file() else {}
    template = template_for(_data_config(trained), trained.tokenizer)
    return with_special_tokens(values, trained.tokenizer, template.stop_ids)


def _write_adapter(trained: Trained, draft: Path) -> None:
    """Copy an adapter, whose base gets a name that means something on other machines."""
    _copy(trained.folder, draft, ("adapter_model.safetensors",))
    values = read_object(trained.folder / CONFIG_FILE, "an adapter configuration")
    values["base_model_name_or_path"] = trained.base_for_others
    (draft / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _obtain(trained: Trained) -> str:
    """Return how to get a base that has no public name."""
    name = trained.base_for_others
    origin = provenance_of(Path(trained.base)) if Path(trained.base).is_dir() else None
    if origin is None:
        return (
            f"The base has no public name: it was the folder `{name}` of whoever trained. Get a copy, and "
            f"put it into this folder as `{name}`.\n\n"
        )
    dtype = "" if origin.dtype == "auto" else f" --dtype {origin.dtype}"
    return (
        f"The base has no public name. It was made of {origin.describe()}. Make it again in this folder: "
        f"`{import_command(origin.source, name)}{dtype}`.\n\n"
    )


def _card(trained: Trained, dtype: str, obtain: str) -> Card:
    """Return the card of an export.

    Args:
        dtype: of a whole model; empty for an adapter.
    """
    values = card_values(trained.folder)
    run = trained.folder.parent
    summary = _json_of(run / "summary.json")
    first_loss = summary.get("first_val_loss")
    return Card(
        run=run.name,
        kind="model" if dtype else "adapter",
        round=int(values.get("round", summary.get("best_round") or 0)),
        base=trained.base_for_others,
        dtype=TORCH_NAMES[dtype] if dtype else values["dtype"],
        format=format_of(trained.tokenizer, _data_config(trained)),
        name=str(values.get("name", "")),
        facts=read_facts(trained.folder),
        first_loss=first_loss if isinstance(first_loss, float) else None,
        scores=_scores(trained.folder),
        origin=origin_text(trained.base),
        obtain=obtain,
        is_merged=bool(dtype) and trained.adapted,
    )


def _scores(folder: Path) -> str:
    """Return the table of the scores of an exported folder; empty if there are none of these weights: those
    of a run that has trained further since are left out.
    """
    evaluation = read_results(folder.parent / results_name(folder.name))
    evaluated = evaluation.get("target", {}).get("weights")
    if not evaluation["results"] or evaluated != weights_digest(folder):
        return ""
    return scores_to_markdown(evaluation["results"])


def _data_config(trained: Trained) -> DataConfig:
    """Return the run's data section, with the template that the weights were trained with."""
    card = read_card(trained.folder)
    known = {field.name for field in dataclasses.fields(DataConfig)}
    section = {key: value for key, value in trained.config.get("data", {}).items() if key in known}
    return DataConfig(
        **section | {"template": card.template, "system_prompt": card.system_prompt, "chat_template": ""}
    )


def _json_of(path: Path) -> dict:
    return read_object(path, "results of a run") if path.is_file() else {}


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """Give a folder that takes the place of `target` at the end, as a whole, and is removed on failure.

    Raises:
        FedSpeedError: the target is a folder that this command did not write, or cannot be written.
    """
    if target.exists() and not (target / MARK).is_file() and not _is_empty(target):
        raise FedSpeedError(
            f"--out={target}: is there already and was not written by `fedspeed export`; name a new folder"
        )
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_writable(target.parent)
        draft.mkdir()
        with activity.during(f"the export to {target.name}"):
            yield draft
        (draft / MARK).write_text("{}\n")
        put_in_place(draft, target)
    except OSError as error:
        raise FedSpeedError(
            f"--out={target}: cannot be written ({error.strerror or error}); make room, or name "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())

"""What `fedspeed eval` evaluates: a base, an exported adapter or model, or a run, as a configuration from
which ranks build their engine.

A run brings its own configuration: the base, the numeric type, the rows and their template, and the engine's
tier. Overrides of the command line come after it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedspeed.checkpoint.card import CardFacts, read_card
from fedspeed.checkpoint.journal import Journal
from fedspeed.config.load import Loaded, load
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.data.config import DataConfig
from fedspeed.errors import ConfigError, FedSpeedError, JournalError, ModelError
from fedspeed.evaluation.results import FILE
from fedspeed.hub_names import is_hub_name
from fedspeed.models.file_digests import weights_digest
from fedspeed.models.local_config import local_folder
from fedspeed.session.chat import KINDS, RUNS, base_of, exported_folder, own_models_note

# Keys of a run that its evaluation keeps: whole sections, or single keys.
_KEPT = ("model", "adapter", "data", "engine", "deepspeed", "run.seed", "train.micro_batch")
# Of those, keys that belong to the training's topology, which an evaluation does not have, and those that the
# exported adapter has its own values of: with a folded adapter, its rank is larger than the trained one.
_DROPPED = (
    "engine.pipeline",
    "engine.cuts",
    "engine.client_slots",
    "adapter.start_from",
    "adapter.rank_by_client",
    "adapter.lora_rank",
    "adapter.alpha",
)
# Sections of which an evaluation takes nothing.
_UNUSED = ("federation", "routing", "checkpoint", "evaluation")
# Overrides that name rows; others of data say how rows, of --held-out for example, become prompts.
_NAMING_ROWS = ("data.task=", "data.path=", "data.held_out=")
NAME = "evaluation"  # of the folder below RUNS for a base that belongs to no run


@dataclass(frozen=True)
class EvalTarget:
    """A model that is evaluated.

    Attributes:
        name: as the user wrote it. kind: `base`, `adapter` or `model`.
        loaded: the configuration of one client without rounds, whose ranks share the items.
        data: of the rows of the run, with its template; of defaults where there is no run.
        results: the file that the results are written to. report: of the run whose main model this is; None
            if it is of no run.
    """

    name: str
    kind: str
    loaded: Loaded
    data: DataConfig
    results: Path
    report: Path | None = None

    @property
    def config(self) -> RunConfig:
        """Return the configuration that ranks build their engine from."""
        return self.loaded.config

    def to_json(self) -> dict[str, Any]:
        """Return what is evaluated, for the file of results.

        A run that trains further has other weights under the same name, so their digest is part of it; null
        where there is no local folder. `note` is there only where the model is the common one of a run whose
        clients have models of their own.
        """
        config = self.config
        adapter = config.adapter.start_from
        folder = Path(adapter) if adapter else local_folder(config.model.base, weights=False)
        note = own_models_note(folder) if folder else ""
        return {
            "name": self.name,
            "kind": self.kind,
            "base": config.model.base,
            "adapter": adapter or None,
            "template": self.data.template,
            "weights": weights_digest(folder) or None if folder else None,
            **({"note": note} if note else {}),
        }


def resolve_target(name: str, overrides: Sequence[str]) -> EvalTarget:
    """Return the model that a user names, with its configuration.

    Args:
        name: of a base (folder or hub name), an exported adapter or model, a run, or a run's folder.
        overrides: `key=value` of the command line.

    Raises:
        FedSpeedError: there is no such model, its run has not finished, or a value is wrong.
    """
    _check_overrides(overrides)
    folder = _folder_of(name)
    if folder is None:
        return _target(name, "base", overrides, base=name)
    if (folder / KINDS["adapter"]).is_file():
        return _target(name, "adapter", overrides, exported=folder)
    kind = "model" if _run_of(folder) or _card(folder) else "base"
    return _target(name, kind, overrides, base=str(folder), exported=folder if kind == "model" else None)


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that an evaluation has no use for.

    Raises:
        ConfigError: there are some.
    """
    wrong = [
        text
        for text in overrides
        if text.split(".")[0].split("=")[0].strip() in _UNUSED
        or any(text.startswith(f"{key}=") for key in ("model.base", *_DROPPED))
    ]
    if wrong:
        raise ConfigError(
            f"{wrong[0]}: an evaluation has one model and no rounds; remove it (TARGET names the model, and "
            f"keys of {', '.join(_KEPT[:4])} and deepspeed can be set)"
        )


def _folder_of(name: str) -> Path | None:
    """Return the folder with the model's files; None for a hub name.

    Raises:
        FedSpeedError: there is neither.
    """
    for folder in (Path(name), RUNS / name):
        if (folder / "journal").is_dir() or any((folder / kind).is_dir() for kind in KINDS):
            return exported_folder(str(folder))
        if any((folder / file).is_file() for file in KINDS.values()):
            return folder
    if is_hub_name(name) and not Path(name).exists():
        return None
    if Path(name).exists():
        raise FedSpeedError(
            f"{name}: holds no config.json, no adapter_config.json and no run; name the folder of a base, of "
            "an exported adapter or model, or of a run"
        )
    return exported_folder(name)  # raises, with the runs that there are


def _target(
    name: str, kind: str, overrides: Sequence[str], *, base: str = "", exported: Path | None = None
) -> EvalTarget:
    """Return the target with its configuration.

    Args:
        base: empty for an adapter, whose run or file names it.
        exported: the folder of an adapter or model that FedSpeed or PEFT has written; None for a base.
    """
    run = None if exported is None else _run_of(exported)
    inherited = _of_export(exported) if run is None else _of_run(run)
    fixed = []
    if kind == "model":
        inherited = {key: text for key, text in inherited.items() if not key.startswith("adapter.")}
        inherited.pop("model.init", None)  # the weights are in the folder, even if the base's were drawn
    if kind == "adapter":
        assert exported is not None
        base = "" if run is not None else base_of(exported)
        fixed.append(f"adapter.start_from={flow(str(exported))}")
    if base:
        fixed.append(f"model.base={flow(base)}")
    out, folder = (run.parent, run.name) if run is not None else (RUNS, NAME)
    fixed += [f"run.out={flow(str(out))}", f"run.name={flow(folder)}"]
    dropped = _of_another_template(inherited, overrides)
    kept = [f"{key}={text}" for key, text in inherited.items() if key not in dropped]
    whole = load(None, [*kept, *fixed, *overrides])
    data = whole.config.data
    is_default = run is None and not any(text.startswith(_NAMING_ROWS) for text in overrides)
    if is_default and data.task == "builtin":
        data = replace(data, task="file")  # data.template=auto then follows from the model
    return EvalTarget(
        name,
        kind,
        replace(whole, config=_one_client(whole.config)),
        data,
        results=_results_file(run, exported),
        report=run / "report.md" if run and exported and exported.name in KINDS else None,
    )


def _of_another_template(inherited: Mapping[str, str], overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys that belong to the inherited template, if the overrides name another one."""
    named = [text.partition("=")[2].strip() for text in overrides if text.startswith("data.template=")]
    if not named or named[-1] == inherited.get("data.template"):
        return frozenset()
    return frozenset({"data.chat_template", "data.system_prompt"})


def _run_of(exported: Path) -> Path | None:
    """Return the run that has exported a folder; None if it does not lie in a run's folder."""
    return exported.parent if (exported.parent / "journal").is_dir() else None


def results_name(exported: str) -> str:
    """Return the name of the file with the results of a run's exported folder: evaluation.json for its main
    one, and evaluation-NAME.json for others.
    """
    return FILE if exported in KINDS else f"{Path(FILE).stem}-{exported}{Path(FILE).suffix}"


def _results_file(run: Path | None, exported: Path | None) -> Path:
    """Return the file of results: in the run's folder, else beside the exported weights, else in the working
    folder.
    """
    if run is not None and exported is not None:
        return run / results_name(exported.name)
    return Path(FILE) if exported is None else exported / FILE


def _one_client(config: RunConfig) -> RunConfig:
    """Return the configuration with one client, whose ranks share the work, and without rounds."""
    data = replace(DataConfig(), clients=1, max_tokens=config.data.max_tokens)
    fresh = RunConfig()
    return replace(
        config, data=data, federation=fresh.federation, routing=fresh.routing, checkpoint=fresh.checkpoint
    )


def _of_run(run: Path) -> dict[str, str]:
    """Return dotted key -> value as YAML of a run's configuration, from its journal.

    Raises:
        JournalError: the journal cannot be read.
    """
    entry = Journal(run, 1).latest()
    if entry is None:
        raise JournalError(
            f"{run}: its journal has no round, so that its configuration is not known; copy the exported "
            "folder to another place and name that"
        )
    values = dict(_leaves(entry.config)) | entry.config.get("places", {})
    return {key: flow(value) for key, value in values.items() if _is_kept(key)}


def _is_kept(key: str) -> bool:
    def is_inside(names: Sequence[str]) -> bool:
        return any(f"{key}.".startswith(f"{name}.") for name in names)

    return is_inside(_KEPT) and not is_inside(_DROPPED)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested values; an empty dict has none."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _of_export(exported: Path | None) -> dict[str, str]:
    """Return dotted key -> value of what an export says: template, system prompt and numeric type."""
    card = _card(exported) if exported is not None else None
    if card is None or exported is None:
        return {}
    values = {"data.template": card.template}
    if card.system_prompt:
        values["data.system_prompt"] = card.system_prompt
    if card.template == "chat" and (exported / "chat_template.jinja").is_file():
        values["data.chat_template"] = str(exported / "chat_template.jinja")
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(card.dtype)
    return values | ({"model.dtype": short} if short else {})


def _card(folder: Path) -> CardFacts | None:
    """Return the facts of a model card of FedSpeed; None where the folder has none."""
    try:
        return read_card(folder)
    except ModelError:
        return None

"""`fedspeed chat`: ask the model that a run has trained, with the prompt that it was trained with."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspeed import activity
from fedspeed.checkpoint.card import CARD_FILE, CardFacts, read_card
from fedspeed.checkpoint.journal import Journal
from fedspeed.data.config import DataConfig
from fedspeed.data.prompt_template import NAMES, PromptTemplate, template_for
from fedspeed.data.rows import Row
from fedspeed.errors import FedSpeedError, ModelError
from fedspeed.federation.named_models import OWN
from fedspeed.models.json_object import read_object
from fedspeed.session.base_of_adapter import RUNS, find_base
from fedspeed.units import shortened_list

KINDS = {"adapter": "adapter_config.json", "model": "config.json"}  # exported folder -> a file of its kind

MODELS_NAMED = 8


@dataclass(frozen=True)
class Loaded:
    """A trained model with its tokenizer.

    Args:
        model, tokenizer: of transformers. template: of the training rows.
    """

    model: Any
    tokenizer: Any
    template: PromptTemplate


def exported_folder(name: str) -> Path:
    """Return the folder that a run has exported.

    Args:
        name: of a run in `RUNS`, the folder of a run, or the exported folder itself.

    Raises:
        FedSpeedError: there is no such run, or it has not finished.
    """
    folder = next((place for place in (Path(name), RUNS / name) if place.is_dir()), None)
    if folder is None:
        there = sorted(path.parent.name for path in RUNS.glob("*/journal")) if RUNS.is_dir() else []
        raise FedSpeedError(
            f"{name}: there is no such folder and no such run; "
            + (
                f"{RUNS}/ holds {', '.join(there[:8])}"
                if there
                else f"{RUNS}/ holds no run, name the folder of one"
            )
        )
    for place in (folder, *(folder / kind for kind in KINDS)):
        if any((place / file).is_file() for file in KINDS.values()):
            return place
    journal = Journal(folder, 1)
    if journal.newest() < 0:
        raise FedSpeedError(
            f"{folder}: holds no adapter/, no model/ and no journal of a run; name the folder of a finished "
            "run"
        )
    raise FedSpeedError(
        f"{folder}: the run has not finished (its journal ends with round {journal.newest()}), so that "
        "nothing is exported yet; "
        "the command that started it goes on from there"
    )


def own_models_note(folder: Path) -> str:
    """Return what to tell the user of a folder with the model that a run's clients have in common, where
    clients have models of their own, so that the losses of the run are not that model's; empty for others.

    Args:
        folder: see `exported_folder`.
    """
    places = sorted(folder.parent.glob(f"{folder.name}-{OWN}*/")) if folder.name in KINDS else []
    own = [place.name for place in places if not place.name.endswith("-last")]
    if not own:
        return ""
    return (
        f"{folder}: this is only what the run's clients have in common; clients have models of their own, "
        f"which the run's losses are of; on this host {shortened_list(own, MODELS_NAMED)} "
        "(name one of these folders for a client's model)"
    )


def load(folder: Path) -> Loaded:
    """Load the model of an exported folder with its base, its tokenizer and its numeric type.

    Raises:
        ModelError: a file is missing, or files do not fit together.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedspeed.models.adapters import saved_lora_config
    from fedspeed.models.loading import model_config

    card = read_card(folder)
    kind = getattr(torch, card.dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ModelError(
            f"{folder / 'README.md'}: dtype {card.dtype!r} is no type of torch; write float32, bfloat16 or "
            "float16"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    adapted = (folder / KINDS["adapter"]).is_file()
    base = base_of(folder) if adapted else str(folder)
    try:
        with (
            activity.during(f"the loading of {base}"),
            warnings.catch_warnings(action="ignore"),
        ):  # the libraries warn about themselves
            model = AutoModelForCausalLM.from_pretrained(
                base, config=model_config(base), dtype=kind, trust_remote_code=False
            )
            if adapted:
                from peft import PeftModel

                model = PeftModel.from_pretrained(
                    model,
                    str(folder),
                    config=saved_lora_config(folder),
                    autocast_adapter_dtype=kind == torch.float32,
                )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except FedSpeedError:
        raise
    except Exception as error:  # the kinds differ by the model's class and the library's version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{base if adapted else folder}: cannot be loaded ({type(error).__name__}: {reason}); "
            "copy the folder again, or correct base_model_name_or_path in adapter_config.json"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Loaded(model.to(device).eval(), tokenizer, _template(card, tokenizer, folder))


def answer(loaded: Loaded, row: Row, max_new_tokens: int, temperature: float = 0.0) -> str:
    """Generate the answer to a row's instruction and input.

    Args:
        max_new_tokens: most tokens of the answer. temperature: of sampling; 0 for the most likely tokens.

    Raises:
        ModelError: the prompt alone is longer than the model has positions.
    """
    import torch

    tokenizer = loaded.tokenizer
    device = next(loaded.model.parameters()).device
    tokens = loaded.template.prompt_ids(row)
    room = loaded.model.config.max_position_embeddings - len(tokens)
    if room < 1:
        raise ModelError(
            f"the prompt has {len(tokens)} tokens, and the model "
            f"{loaded.model.config.max_position_embeddings} positions; shorten it"
        )
    ids = torch.tensor([tokens], device=device)
    sampled = (
        {"temperature": temperature} if temperature else {"temperature": None, "top_p": None, "top_k": None}
    )
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, room),
            do_sample=temperature > 0,
            eos_token_id=sorted(loaded.template.stop_ids),
            pad_token_id=tokenizer.pad_token_id,
            **sampled,
        )
    return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)


def _template(card: CardFacts, tokenizer: Any, folder: Path) -> PromptTemplate:
    """Return the prompt template that an export's card names."""
    known = next((template for template in NAMES if template == card.template), None)
    if known is None:
        raise ModelError(
            f"{folder / CARD_FILE}: template {card.template!r} is unknown; write {' or '.join(NAMES)}, or "
            "install the version of FedSpeed that exported the model"
        )
    return template_for(DataConfig(template=known, system_prompt=card.system_prompt), tokenizer)


def base_of(folder: Path) -> str:
    """Return the base of an adapter: a folder with weights, or a hub name."""
    path = folder / KINDS["adapter"]
    base = read_object(path, "an adapter configuration").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{path}: does not name its base in base_model_name_or_path; export it again, the command of the "
            "run does so"
        )
    base = find_base(base, folder)
    remedy = "bring it back, or correct base_model_name_or_path there"
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ModelError(f"{path}: its base {base} is not there; {remedy}")
    if Path(base).is_dir() and not any(Path(base).glob("*.safetensors")):
        raise ModelError(
            f"{path}: its base {base} holds no weights, as with model.init=random, where they were drawn "
            "for the run alone; "
            "train the adapter of a base that has some, or a whole model with adapter.method=full"
        )
    return base

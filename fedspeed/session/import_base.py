"""`fedspeed import-base`: import a model, load it in the engine, and let it answer."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedspeed import activity
from fedspeed.checkpoint.card import CARD_FILE
from fedspeed.cluster.devices import choose_accelerator
from fedspeed.data.config import DataConfig
from fedspeed.data.prompt_template import template_for
from fedspeed.engine import device_types
from fedspeed.errors import ModelError
from fedspeed.models.base_files import check_base
from fedspeed.models.config import ModelConfig
from fedspeed.models.importing.folder import is_imported, write_base
from fedspeed.models.importing.source import find_source
from fedspeed.models.json_object import read_object
from fedspeed.models.numeric_types import lowest_common
from fedspeed.models.provenance import origin_text
from fedspeed.models.tokenizer import load_tokenizer
from fedspeed.session.single_engine import single_engine

QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"  # for a model without a chat template
NEW_TOKENS = 24
# Texts that a tokenizer should give back as they were.
TEXTS = ("The quick brown fox: 3 x 14 = 42.", "def f(x):\n    return x + 1\n", "naïve café, Grüße, 東京 🙂")
FP32_BYTES = 8 << 30  # size of a base in fp32 up to which a CPU computes the answer in fp32


def import_base(
    name: str, out: Path, dtype: str = "auto", *, origin: str = "", ask: bool = True
) -> list[str]:
    """Import a model into a folder, unless it is there already; return lines to print.

    Args:
        name: a GGUF file, a folder, or a hub name. dtype: auto, fp32, bf16 or fp16.
        origin: where the user got it. ask: whether the engine loads it and it answers a question.

    Raises:
        ModelError: it cannot be imported; `out` is then as it was.
    """
    source = find_source(name, dtype, origin)
    if is_imported(source, out):
        return [f"{out} is there already: {source.provenance.describe()}"]
    lines: list[str] = []

    def check(draft: Path) -> None:
        lines.extend(_check(draft, ask))

    provenance, notes = write_base(source, out, check)
    return [f"base     {out}: {provenance.describe()}", *lines, *(f"note     {note}" for note in notes)]


def _check(draft: Path, ask: bool) -> list[str]:
    """Check that a base can be used; return lines about it."""
    tokenizer = load_tokenizer(ModelConfig(base=str(draft)))
    shape, stored, _ = check_base(draft)
    size = sum(tensor.end - tensor.begin for tensor in stored.values())
    lines = [f"model    {shape.family}, {shape.size_text}, {size / 1e6:.1f} MB"]
    lines += [f"note     {text}" for text in _tokenizer_notes(tokenizer, shape.vocab)]
    _write_card(draft, tokenizer)
    if not ask:
        return lines
    model = ModelConfig(base=str(draft), dtype=_dtype(shape.total))
    prompt, ids = _prompt(tokenizer)
    with activity.during("the first answer of the model"), single_engine(model) as engine:
        [[answer]] = engine.generate(
            [np.array(ids, dtype=np.int64)], max_new=NEW_TOKENS, stop=[tokenizer.eos_token_id]
        )
    if not len(answer):
        raise ModelError(
            f"the imported model answers {prompt!r} with nothing; get the model again, or import it with "
            "--no-answer if it is not meant to answer"
        )
    return [*lines, f"prompt   {prompt!r}", f"answer   {tokenizer.decode(answer.tolist())!r}"]


def _write_card(draft: Path, tokenizer: Any) -> None:
    """Write the card by which `fedspeed chat` knows how to ask the base: as a run would by default."""
    template = template_for(DataConfig(task="file"), tokenizer).name
    dtype = read_object(draft / "config.json", "a model configuration").get("dtype") or "float32"
    front = yaml.safe_dump({"fedspeed": {"template": template, "dtype": dtype}}, sort_keys=False)
    text = f"---\n{front}---\n\n# A base for FedSpeed\n\nImported from {origin_text(str(draft))}.\n"
    (draft / CARD_FILE).write_text(text, encoding="utf-8")


def _dtype(parameters: int) -> Any:
    """Return the type in which this machine computes an answer."""
    choose_accelerator(os.environ)
    dtype = lowest_common(device_types.device_types())
    return "bf16" if dtype == "fp32" and 4 * parameters > FP32_BYTES else dtype


def _prompt(tokenizer: Any) -> tuple[str, list[int]]:
    """Return a question in the model's chat template, or the beginning of a sentence, as text and tokens."""
    if not tokenizer.chat_template:
        return BEGINNING, tokenizer(BEGINNING).input_ids
    messages = [{"role": "user", "content": QUESTION}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and raises what it likes
        raise ModelError(
            f"the model's chat template cannot be used ({type(error).__name__}: {error}); correct it in "
            "chat_template.jinja, or delete it"
        ) from error
    return text, tokenizer(text, add_special_tokens=False).input_ids


def _tokenizer_notes(tokenizer: Any, vocabulary: int) -> list[str]:
    """Return notes on texts that the tokenizer changes, and on tokens without an embedding."""
    notes = []
    changed = [
        text
        for text in TEXTS
        if tokenizer.decode(
            tokenizer(text, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False
        ).strip()
        != text.strip()
    ]
    if changed:
        notes.append(f"the tokenizer does not give back {changed[0]!r} as it was")
    if len(tokenizer) > vocabulary:
        notes.append(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings of {vocabulary}; rows that "
            "need the others are refused"
        )
    return notes

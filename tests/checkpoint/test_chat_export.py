"""A model that was trained with a chat template: the template is exported, the card's code and
`fedspeed chat` prompt with it, and an answer ends with the template's token.
"""

import contextlib
import io
import json

import pytest

from fedspeed.checkpoint.card import Card, read_card
from fedspeed.checkpoint.export import export
from fedspeed.cli import main
from fedspeed.data.config import DataConfig
from fedspeed.data.prompt_format import format_of
from fedspeed.data.prompt_template import template_for
from fedspeed.data.rows import Row
from tests.data.chat_tokenizers import FAMILIES, chat_tokenizer

CONFIG = DataConfig(task="file", path="rows.jsonl", system_prompt="Be\nbrief")
QUESTION = "Name three colours."  # the example of the card


@pytest.fixture(scope="module", params=["chatml_without_prompt", "llama3"])
def exported(request, tmp_path_factory):
    """Return the family, the exported folder, and its model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    tokenizer = chat_tokenizer(request.param)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    folder = tmp_path_factory.mktemp(request.param) / "model"
    format = format_of(tokenizer, CONFIG)
    card = Card("run", "model", 1, base="base", dtype="float32", format=format)
    export(
        folder,
        model,
        tokenizer,
        tensors={name: tensor.detach().numpy() for name, tensor in model.named_parameters()},
        base="base",
        card=card.text(),
        chat_template=format.chat.jinja,
        stop_ids=format.end[0],
    )
    return request.param, folder, model


def test_the_template_of_the_training_is_exported(exported):
    from transformers import AutoTokenizer

    family, folder, _ = exported
    template = template_for(CONFIG, chat_tokenizer(family))
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == template.jinja and "strftime_now(" not in loaded.chat_template
    assert read_card(folder)[0::2] == ("chat", "Be\nbrief")
    values = json.loads((folder / "generation_config.json").read_text())
    ends = values["eos_token_id"]
    assert set(ends if isinstance(ends, list) else [ends]) == template.stop_ids
    text = (folder / "README.md").read_text()
    assert FAMILIES[family].turn_end in text and "Be\nbrief" in text
    assert ("26 July 2024" in text) == (family == "llama3")


def test_the_cards_code_and_chat_give_the_same_answer(exported, monkeypatch):
    import torch

    family, folder, model = exported
    tokenizer = chat_tokenizer(family)
    template = template_for(CONFIG, tokenizer)
    ids = torch.tensor([template.prompt_ids(Row(QUESTION, "", "", ""))])
    output = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=sorted(template.stop_ids))
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as by_code:
        exec(code, {})  # noqa: S102
    with contextlib.redirect_stdout(io.StringIO()) as by_chat:
        assert main(["chat", str(folder), QUESTION, "--max-new-tokens", "64"]) == 0
    assert by_code.getvalue() == by_chat.getvalue() == expected

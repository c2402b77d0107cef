"""The byte tokenizer loses nothing and survives saving; the loader says what is missing."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedspeed.errors import ModelError
from fedspeed.models.config import ModelConfig
from fedspeed.models.tokenizer import byte_tokenizer, load_tokenizer

BYTES = byte_tokenizer()
TRICKY = [
    "",
    " ",
    "  a  b\n\t\r\0",
    "h\u00e9llo \u6f22\u5b57 \U0001f600",
    "<eos><bos> <pad>",
    "it 's n't a , b .",
    "\u0120\u010a",
    "e\u0301",
    "\ufeffx",
]


@given(st.one_of(st.text(), st.sampled_from(TRICKY)))
@settings(deadline=None)
def test_ids_are_the_bytes_of_the_text(text):
    ids = BYTES(text).input_ids
    assert ids == [257, *text.encode()]
    assert BYTES.decode(ids, skip_special_tokens=True) == text


def test_special_tokens():
    assert len(BYTES) == 260
    assert (BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_id, BYTES.unk_token_id) == (
        256,
        257,
        258,
        259,
    )
    assert BYTES(["a", "abc"], padding=True).input_ids == [[257, 97, 256, 256], [257, 97, 98, 99]]


def test_saved_and_reloaded_offline(tmp_path):
    BYTES.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        assert loaded(text).input_ids == BYTES(text).input_ids
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (256, 258)


def test_loading_by_each_way(tmp_path):
    BYTES.save_pretrained(tmp_path)
    for config in (
        ModelConfig(tokenizer="bytes"),
        ModelConfig(base=str(tmp_path)),
        ModelConfig(base="elsewhere", tokenizer=str(tmp_path)),
    ):
        assert load_tokenizer(config)("a").input_ids == [257, 97]


def edit_config(folder, change):
    BYTES.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_pad_falls_back_to_eos(tmp_path):
    edit_config(tmp_path, lambda config: {key: value for key, value in config.items() if key != "pad_token"})
    assert load_tokenizer(ModelConfig(base=str(tmp_path))).pad_token_id == 258


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    edit_config(tmp_path, lambda config: {key: value for key, value in config.items() if key != "eos_token"})
    with pytest.raises(ModelError, match="no end-of-sequence token.*eos_token"):
        load_tokenizer(ModelConfig(base=str(tmp_path)))


def test_missing_tokenizers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for config, words in [
        (ModelConfig(), "model.base, which is empty; set model.base, or model.tokenizer=bytes"),
        (
            ModelConfig(base=str(tmp_path)),
            f"model.base={tmp_path}: the folder holds no tokenizer.*model.tokenizer=bytes",
        ),
        (
            ModelConfig(base=str(tmp_path / "broken")),
            "model.base=.*broken: the tokenizer cannot be read.*model.tokenizer=bytes",
        ),
        (ModelConfig(base="no-owner/no-name"), "model.base: no-owner/no-name is no folder here.*hf download"),
        (ModelConfig(tokenizer="absent"), "model.tokenizer=absent: no such folder.*model.tokenizer=bytes"),
    ]:
        with pytest.raises(ModelError, match=f"(?s){words}"):
            load_tokenizer(config)

"""Encoding: loss on answer and end only, the prompt's ids never depend on the answer, nothing without loss
survives.
"""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Example
from fedspeed.data.prompt_template import template_for
from fedspeed.data.rows import Row
from fedspeed.models.config import ModelConfig
from fedspeed.models.tokenizer import byte_tokenizer, load_tokenizer

ROW = Row("say", "ab", "cd", "")
PROMPT = [257, *b"say ab "]


def encode(row, tokenizer, template, max_tokens):
    """Return the example of a row, None if it has none."""
    encoded = template_for(DataConfig(template=template, max_tokens=max_tokens), tokenizer).encode(row)
    return encoded.examples[0] if encoded.examples else None


def test_auto_template():
    def auto(task, template="auto"):
        return template_for(DataConfig(task=task, template=template), byte_tokenizer()).name

    tasks = ("builtin", "gsm8k", "dolly", "codealpaca", "file")
    assert [auto(task) for task in tasks] == ["plain"] + 4 * ["alpaca"]
    assert auto("builtin", "alpaca") == "alpaca"


def test_ids_and_labels():
    example = encode(ROW, byte_tokenizer(), "plain", 64)
    assert example.input_ids.dtype == np.int32
    assert example.input_ids.tolist() == [*PROMPT, *b"cd", 258]
    assert example.labels.dtype == np.int64
    assert example.labels.tolist() == [-100] * len(PROMPT) + [*b"cd", 258]
    assert (example.labels_start, example.answer_tokens) == (len(PROMPT), 3)


@pytest.mark.parametrize(("max_tokens", "answer"), [(11, [*b"cd", 258]), (10, [*b"cd"]), (9, [*b"c"])])
def test_the_cut_takes_the_end_of_the_answer(max_tokens, answer):
    example = encode(ROW, byte_tokenizer(), "plain", max_tokens)
    assert example.input_ids.tolist() == PROMPT + answer
    assert example.answer_tokens == len(answer)
    assert example.cut == (max_tokens < 11)


@pytest.mark.parametrize("max_tokens", [8, 7])
def test_a_row_whose_answer_is_cut_away_is_dropped(max_tokens):
    assert encode(ROW, byte_tokenizer(), "plain", max_tokens) is None


def merging_tokenizer(**special):
    """Merges "space + c": encoding prompt and answer in one text would change the last id of the prompt."""
    vocabulary = {token: i for i, token in enumerate(["s", "a", "y", " ", "c", " c", "d", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(" ", "c")]))
    if "bos_token" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 7), ("</s>", 8)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False, **special
    )


def test_no_merge_over_the_boundary():
    tokenizer = merging_tokenizer()
    assert tokenizer("say cd").input_ids == [0, 1, 2, 5, 6]
    assert encode(Row("say", "", "cd", ""), tokenizer, "plain", 64).input_ids.tolist() == [
        0,
        1,
        2,
        3,
        4,
        6,
        8,
    ]


def test_bos_where_the_tokenizer_adds_one_and_a_single_eos():
    example = encode(Row("say", "", "cd", ""), merging_tokenizer(bos_token="<s>"), "plain", 64)
    assert example.input_ids.tolist() == [7, 0, 1, 2, 3, 4, 6, 8]
    assert example.labels.tolist() == [-100] * 5 + [4, 6, 8]


def test_the_first_token_of_a_sequence_never_counts():
    """An answer at position 0 has nothing it could be predicted from."""
    example = Example(np.arange(5, dtype=np.int32), labels_start=0)
    assert example.answer_tokens == (example.labels[1:] != -100).sum() == 4


def test_an_answer_of_one_token_without_anything_before_it_is_dropped():
    tokenizer = merging_tokenizer()
    assert encode(Row("", "", "", ""), tokenizer, "alpaca", 64) is not None
    assert encode(Row("", "", "", ""), tokenizer, "plain", 1) is None


def test_names_of_special_tokens_in_the_text_are_text():
    example = encode(Row("say", "", "<eos>", ""), byte_tokenizer(), "plain", 64)
    assert example.input_ids.tolist()[-6:] == [*b"<eos>", 258]


@pytest.mark.parametrize("saved", [False, True], ids=["made", "loaded"])
def test_special_tokens_of_a_trained_tokenizer_are_text_in_a_row(tmp_path, saved):
    """Of a tokenizer with tokens of its own for them, which it would find in any text; bos and eos stay where
    the encoding puts them.
    """
    tokenizer = byte_pair_tokenizer()
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(ModelConfig(base=str(tmp_path)))
    row = Row("Strike <s>out</s>", "a</s>b", "<p>Use <s>old</s>, or <unk>?</p>", "")
    ids = encode(row, tokenizer, "alpaca", 2048).input_ids.tolist()
    assert tokenizer.eos_token_id in tokenizer(row.output).input_ids, (
        "the tokenizer itself reads it as a token"
    )
    assert [i for i in ids if i in tokenizer.all_special_ids] == [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids[1:-1]).endswith("### Response:<p>Use <s>old</s>, or <unk>?</p>")
    assert tokenizer.eos_token_id in tokenizer(row.output).input_ids, (
        "and so it stays: what is exported is the base's own tokenizer"
    )


def test_a_vocabulary_that_holds_the_names_itself_spells_them_out_too():
    """Of a Unigram model, whose pieces are chosen by their score: it finds `</s>` in plain text."""
    letters = "abcdefghijklmnopqrstuvwxyz<>/\u2581"
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in letters)], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    ids = encode(Row("say", "", "use <s>old</s> 7 it", ""), fast, "plain", 64).input_ids.tolist()
    assert ids.count(fast.eos_token_id) == 1 and ids[-1] == fast.eos_token_id and fast.bos_token_id not in ids
    assert fast.decode(ids[:-1]).endswith("use <s>old</s> <unk> it")


def byte_pair_tokenizer():
    """As GPT-2's and Llama 3's are made: a byte-level BPE trained on text, with special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["some text, some more text: <p>Use it</p>"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def test_no_warning_about_long_texts(caplog):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 4
    encode(ROW, tokenizer, "plain", 64)
    assert caplog.records == []

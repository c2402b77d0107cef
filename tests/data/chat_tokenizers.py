"""Small tokenizers with the chat templates of known model families: the templates are rewritten shortly, with
the same output, in chat_templates/.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).with_name("chat_templates")


@dataclass(frozen=True)
class Family:
    """The tokens of a family.

    Attributes:
        eos, bos: names; bos is empty if there is none. turn_end: the token behind an answer.
        special: other special tokens. added: tokens that are not marked as special.
        refuses: roles or orders that the template refuses. is_split: whether each answer of a conversation is
            an example of its own.
    """

    eos: str
    bos: str
    turn_end: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    is_split: bool = False


FAMILIES = {
    "smollm2": Family("<|im_end|>", "<|im_start|>", "<|im_end|>", ("<|endoftext|>",)),
    "chatml_without_prompt": Family("<|endoftext|>", "", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama3": Family(
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    ),
    "gemma": Family(
        "<eos>", "<bos>", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), refuses=("system", "order")
    ),
    "mistral": Family("</s>", "<s>", "</s>", ("[INST]", "[/INST]"), refuses=("order",)),
    "phi3": Family("<|endoftext|>", "<s>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "qwen3": Family(
        "<|im_end|>",
        "",
        "<|im_end|>",
        ("<|im_start|>", "<|endoftext|>"),
        added=("<think>", "</think>"),
        is_split=True,
    ),
    "deepseek_r1": Family(
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    "zephyr": Family("</s>", "<s>", "</s>", ("<unk>",)),
}


@cache
def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the special tokens of a family and its chat template.

    It has no pre-tokenizer that divides a text: tokens reach over words, spaces and line ends, and so over
    the border between a template's text and a message.
    """
    names = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = [
        "user\nHello\n\nmodel\n\n Yes, I am.\n",
        "assistant\nHello, how are you?\n",
        "system\nYou are\n\n\nbrief <|im",
        " [/ INST] x</ <| end|> \n \n\n  Hi\n",
        "<think>\nso\n</think>\n\nYes</think",
    ] * 8
    tokenizer.train_from_iterator(text, trainer)
    # Phi-3's tokens take the space behind them.
    special = dict.fromkeys([names.eos, *([names.bos] if names.bos else []), *names.special])
    tokenizer.add_special_tokens([
        AddedToken(name, special=True, normalized=False, rstrip=family == "phi3") for name in special
    ])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names.added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=names.eos,
        pad_token=names.eos,
        bos_token=names.bos or None,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    return fast

"""The tokenizer of a run: the base's own, one from a folder, or the built-in one over bytes."""

from pathlib import Path
from typing import TYPE_CHECKING

from fedspeed.errors import ModelError
from fedspeed.models.config import ModelConfig
from fedspeed.models.hub import model_folder
from fedspeed.models.local_config import TOKENIZER_SIGNS, has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Special tokens follow the 256 bytes, whose ids are their values.
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """Return a tokenizer that needs no file: ids 0 to 255 are the bytes of the UTF-8 text, then pad, bos,
    eos, unk.

    It is lossless for any text: nothing is normalised, merged or cleaned, and the names of special tokens in
    a text are read as ordinary bytes. A text begins with bos, as with Llama.

    Returns:
        a transformers PreTrainedTokenizerFast; `save_pretrained` writes a folder that AutoTokenizer reads
        offline.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    vocabulary |= {token: 256 + i for i, token in enumerate(_SPECIAL.values())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        padding_side="right",
        **_SPECIAL,
    )


def load_tokenizer(config: ModelConfig) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that `model.tokenizer` names, with a pad token.

    Raises:
        ModelError: there is no tokenizer at that place, it cannot be read, or it has no end-of-sequence
            token.
    """
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    key, place = (
        ("model.base", config.base) if config.tokenizer == "auto" else ("model.tokenizer", config.tokenizer)
    )
    if not place:
        raise ModelError(
            "model.tokenizer=auto takes the tokenizer of model.base, which is empty; set model.base, or "
            "model.tokenizer=bytes"
        )
    if key == "model.base":
        place = str(model_folder(place, config.init == "pretrained", tokenizer=True))
    return _with_pad(_read(key, place), f"{key}={place}")


def check_ids(largest: int, config: ModelConfig) -> None:
    """Raise ModelError if the base has no embedding for the largest token id of the data, which would end the
    first forward pass with an index error.
    """
    from transformers import AutoConfig

    try:
        folder = model_folder(config.base, config.init == "pretrained")
        size = AutoConfig.from_pretrained(folder, trust_remote_code=False).vocab_size
    except (OSError, ValueError, KeyError, AttributeError):
        return  # a folder that cannot be read is refused where the model is built, with a better reason
    if largest >= size:
        raise ModelError(
            f"model.base={config.base}: its config.json has vocab_size={size}, but "
            f"model.tokenizer={config.tokenizer} gives token ids "
            f"up to {largest}; choose the tokenizer that belongs to this base"
        )


def _read(key: str, place: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    remedy = "give a folder with tokenizer.json in model.tokenizer, or use model.tokenizer=bytes"
    folder = Path(place)
    if folder.is_dir() and not has_tokenizer(folder):
        raise ModelError(
            f"{key}={place}: the folder holds no tokenizer (none of {', '.join(TOKENIZER_SIGNS)}); {remedy}"
        )
    if key == "model.tokenizer" and not folder.is_dir():
        raise ModelError(f"{key}={place}: no such folder; {remedy}")
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # which one a damaged tokenizer raises differs by its class and version
        raise ModelError(
            f"{key}={place}: the tokenizer cannot be read ({type(error).__name__}: {error}); {remedy}"
        ) from error


def _with_pad(tokenizer: "PreTrainedTokenizerBase", place: str) -> "PreTrainedTokenizerBase":
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{place}: the tokenizer has no end-of-sequence token, so no answer could end; "
            "add eos_token to its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked in attention and in the loss, so its id does not matter.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _byte_characters() -> list[str]:
    """Return the printable character for each byte, by byte value, as the ByteLevel pre-tokenizer writes them
    (GPT-2's table).

    Printable Latin-1 bytes stand for themselves, the other 68 for the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

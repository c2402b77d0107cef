"""What is trained: the base model, its numeric type, its tokenizer, and the trainable part."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    base: str = field(default="", metadata={
        "help": "folder of a Hugging Face causal LM (config.json + *.safetensors), a hub name, or with init random a folder of "
                "ds_configs/models by its name, such as gpt3-125m", "path": ()})
    init: Literal["pretrained", "random"] = field(default="pretrained", metadata={
        "help": "random: only config.json is read and the weights are drawn from run.seed"})
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(default="auto", metadata={
        "help": "numeric type of weights and arithmetic; fp32 masters are kept in every case. auto, decided once for all ranks of a run: bf16, or "
                "fp16 where a GPU has no bf16, or fp32 where a CPU takes part"})
    tokenizer: str = field(default="auto", metadata={
        "help": "auto (the base's own), bytes (built in, 260 tokens), or a folder", "path": ("auto", "bytes")})


@dataclass(frozen=True)
class AdapterConfig:
    method: Literal["lora", "blocks", "full"] = field(default="lora", metadata={
        "help": "what is trained and exchanged: LoRA, some decoder blocks as a whole, or everything"})
    blocks: str = field(default="last:2", metadata={
        "help": "for method blocks: last:N, or numbers and ranges from 0, such as 10,12-15"})
    lora_rank: int = field(default=8, metadata={"help": "r of LoRA: the inner dimension of the product B A", "min": 1, "max": 65_536})
    alpha: float = field(default=16.0, metadata={"help": "LoRA scale numerator; the update is alpha / lora_rank * B A", "above": 0.0})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input", "min": 0.0, "max": 0.99})
    targets: str = field(default="attention", metadata={
        "help": "attention (q and v), all-linear, or a comma-separated list of module names"})
    start_from: str = field(default="", metadata={"help": "PEFT folder to start from; empty: a fresh adapter", "path": ()})


def chosen_blocks(text: str, depth: int | None = None) -> set[int]:
    """Reads `adapter.blocks`. Without `depth`, the number of the model's blocks, only the form is checked and `last:N` gives nothing.

    Raises:
        ValueError: with the reason.
    """
    kind, _, number = text.partition(":")
    try:
        if kind.strip() == "last":
            count = _whole(number)
            if count < 1 or (depth is not None and count > depth):
                raise ValueError(f"last:{count} of {depth or 'some'} blocks")
            return set() if depth is None else set(range(depth - count, depth))
        chosen: set[int] = set()
        for part in text.split(","):
            first, dash, last = part.partition("-")
            span = range(_whole(first), _whole(last if dash else first) + 1)
            if not span or span.start < 0 or (depth is not None and span.stop > depth):
                raise ValueError(f"{part.strip()} is empty or beyond the last block, {depth - 1 if depth else 'N'}")
            chosen.update(span)
    except ValueError as error:
        raise ValueError(f"adapter.blocks={text!r}: {error}; write last:N, or numbers and ranges from 0, such as 10,12-15") from None
    return chosen


def _whole(text: str) -> int:
    """Reads one number of `adapter.blocks`.

    Raises:
        ValueError: it is none.
    """
    if not (text.strip().isascii() and text.strip().isdecimal() and len(text) < 10):
        raise ValueError(f"{text.strip()!r} is no block's number")
    return int(text)

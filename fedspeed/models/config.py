"""What is trained: the base model, its numeric type, its tokenizer, and the trainable part."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    base: str = field(
        default="",
        metadata={
            "help": (
                "folder of a Hugging Face causal LM (config.json and *.safetensors), or a hub name; "
                "with init=random also a folder of ds_configs/models by its name, such as gpt3-125m"
            ),
            "path": (),
        },
    )
    init: Literal["pretrained", "random"] = field(
        default="pretrained",
        metadata={"help": "random: read config.json only and draw the weights from run.seed"},
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto",
        metadata={
            "help": (
                "numeric type of weights and arithmetic; trained values are always kept in fp32 too. "
                "auto, resolved once for all ranks of a run: bf16, or fp16 if a GPU has no bf16, or "
                "fp32 if a CPU takes part"
            )
        },
    )
    tokenizer: str = field(
        default="auto",
        metadata={
            "help": "auto (that of the base), bytes (built in, 260 tokens), or a folder",
            "path": ("auto", "bytes"),
        },
    )


@dataclass(frozen=True)
class LastBlocks:
    last: int = field(
        default=2, metadata={"help": "number of the last decoder blocks", "min": 1, "max": 1024}
    )


@dataclass(frozen=True)
class AdapterConfig:
    method: Literal["lora", "blocks", "full"] = field(
        default="lora",
        metadata={
            "help": (
                "what is trained and exchanged. lora: LoRA factors; blocks: whole decoder blocks; "
                "full: all weights"
            )
        },
    )
    blocks: LastBlocks | tuple[int, ...] = field(
        default=LastBlocks(),
        metadata={
            "help": (
                "method=blocks: which decoder blocks, {last: N} or their numbers from 0, such as [10, 12, 13]"
            ),
            "min": 0,
            "max": 1023,
        },
    )
    lora_rank: int = field(
        default=8,
        metadata={"help": "rank r of LoRA, the inner dimension of the product B A", "min": 1, "max": 65_536},
    )
    rank_by_client: dict[str, int] | Literal["auto"] = field(
        default_factory=dict,
        metadata={
            "help": (
                "smaller LoRA ranks of some clients, by client number, such as {0: 16, 3: 4}; the others "
                "have lora_rank. auto: the largest of lora_rank, lora_rank/2, lora_rank/4 ... with which a "
                "client's devices have enough memory, by the hostfile or a probe. The LoRA scale is the same "
                "for all. For federation.method=flexlora and stack"
            ),
            "min": 1,
            "max": 65_536,
        },
    )
    alpha: float = field(
        default=16.0,
        metadata={
            "help": "numerator of the LoRA scale: alpha / lora_rank * B A is added to a weight",
            "above": 0.0,
        },
    )
    dropout: float = field(
        default=0.0, metadata={"help": "dropout on the input of the adapter", "min": 0.0, "max": 0.99}
    )
    targets: Literal["attention", "all-linear"] | tuple[str, ...] = field(
        default="attention",
        metadata={
            "help": "attention (q and v, or the one matrix that holds them), all-linear, or a list of module "
            "names, such as [q_proj, v_proj]"
        },
    )
    start_from: str = field(
        default="",
        metadata={"help": "PEFT folder of an adapter to start from; empty: a new adapter", "path": ()},
    )


def chosen_blocks(blocks: LastBlocks | tuple[int, ...], depth: int) -> set[int]:
    """Return the numbers of the decoder blocks that `adapter.blocks` means in a model of `depth` blocks.

    Raises:
        ValueError: it names none, or some that the model does not have.
    """
    if isinstance(blocks, LastBlocks):
        if blocks.last > depth:
            raise ValueError(
                f"adapter.blocks.last={blocks.last}, but the model has {depth} blocks; choose at most {depth}"
            )
        return set(range(depth - blocks.last, depth))
    if not blocks or max(blocks) >= depth:
        wrong = f"names {max(blocks)}" if blocks else "names no block"
        raise ValueError(
            f"adapter.blocks={list(blocks)} {wrong}, but the model has blocks 0 to {depth - 1}; "
            "write some of those, or {last: N}"
        )
    return set(blocks)

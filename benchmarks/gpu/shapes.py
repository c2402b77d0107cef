"""Models and steps of the campaign, in their size for a card and in a tiny one for a dry run on a CPU."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from fedspeed.models.catalogue import KNOWN, from_config
from fedspeed.models.families.shape import ModelShape

TINY = from_config(
    {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 320,
    },
    "tiny",
    "tiny",
)
# Where there is no card: tokens of a row, micro-batches, blocks.
DRY_TOKENS = 16
DRY_MICRO = 4
DRY_BLOCKS = 3


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step: `micro` micro-batches of `rows` rows of `tokens` tokens."""

    name: str
    tokens: int
    micro: int
    rows: int = 1

    @property
    def total(self) -> int:
        """Return the tokens of the step."""
        return self.tokens * self.micro * self.rows

    def batches(self, vocab: int):
        """Draw rows from one seed, however they are divided; the first half of each row is the prompt."""
        from benchmarks.common import Rows

        return Rows(SimpleNamespace(vocab=vocab, tokens=self.tokens), 0).step(self.micro, self.rows)


def model_of(name: str, dry: bool, blocks: int = 0) -> ModelShape:
    """Return the dimensions of `7B` or `14B`; without a card, of a model of a few thousand parameters.

    Args:
        blocks: 0: as many as the model has.
    """
    if dry:
        return replace(TINY, layers=min(blocks or DRY_BLOCKS, DRY_BLOCKS))
    shape = KNOWN[f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{name}"]
    return replace(shape, layers=blocks or shape.layers)


def step_of(step: Step, dry: bool) -> Step:
    """Return the step as it is measured; without a card it has few short rows."""
    return replace(step, tokens=DRY_TOKENS, micro=min(step.micro, DRY_MICRO)) if dry else step


def write_model(folder: Path, shape: ModelShape) -> Path:
    """Write the configuration of a model without weights, which are drawn when it is loaded."""
    from transformers import Qwen2Config

    Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=32768,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ).save_pretrained(folder)
    return folder

"""Weights, optimizer state and traffic of every method, as formulas of the model's dimensions.

Written from the methods' descriptions and apart from the code that they are compared with. Symbols: N blocks,
h hidden, r the rank of LoRA, P its parameters, s bytes of a number of the base, n participants. All sizes are
bytes, for one client (or the server), and traffic is of one round.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FP32 = 4


@dataclass(frozen=True)
class Model:
    """A Llama-shaped model whose LoRA is on q and v."""

    blocks: int
    hidden: int
    kv: int
    inner: int
    vocab: int
    tied: bool
    rank: int = 8
    number: int = 2  # bytes of a number of the base

    @classmethod
    def read(cls, folder: Path, **more) -> "Model":
        """Read config.json of a base."""
        config = json.loads((folder / "config.json").read_text())
        head = config["hidden_size"] // config["num_attention_heads"]
        return cls(
            blocks=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            kv=head * config["num_key_value_heads"],
            inner=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=config["tie_word_embeddings"],
            **more,
        )

    def weights(self, blocks: int | None = None) -> int:
        """Return the bytes of the base with so many of its blocks (None: all), embedding, norm and head."""
        h = self.hidden
        block = 2 * h * h + 2 * h * self.kv + 3 * h * self.inner + 2 * h
        tables = self.vocab * h * (1 if self.tied else 2)
        count = self.blocks if blocks is None else blocks
        return (count * block + tables + h) * self.number

    def lora(self, blocks: int | None = None) -> int:
        """Return the parameters of LoRA on q and v of so many blocks."""
        count = self.blocks if blocks is None else blocks
        return count * self.rank * (self.hidden + self.hidden + self.hidden + self.kv)

    def sketch(self) -> int:
        """Return the values of the sketch from which the averaging error is estimated: 16 a matrix."""
        return 16 * 2 * self.blocks


@dataclass(frozen=True)
class Round:
    """What a round consists of.

    Attributes:
        participants: of a sum. steps: local steps. tokens: of all a client's rows in the round, with padding.
        boundary: real tokens of all a client's rows. seeds: of FedKSeed.
    """

    participants: int
    steps: int
    tokens: int
    seeds: int = 4096


@dataclass(frozen=True)
class Cost:
    """Sizes of one role.

    Attributes:
        weights: of the frozen base. optimizer: masters and moments, fp32. sent: by a participant in a round;
            None: not compared.
    """

    weights: int
    optimizer: int
    sent: float | None


def plain_sum(values: int, participants: int) -> float:
    """Return the bytes that each participant sends for a sum: its chunks to their owners, and its own sum to
    all.
    """
    return 2 * (participants - 1) / participants * values * FP32


def adam(parameters: int) -> int:
    """Return the bytes of fp32 masters and two moments."""
    return 3 * FP32 * parameters


def sgd(parameters: int) -> int:
    """Return the bytes of fp32 masters; SGD without momentum has no state."""
    return FP32 * parameters


def averaged(optimizer: Callable[[int], int] = adam) -> Callable[[Model, Round], Cost]:
    """Return the formula of a method that averages all LoRA factors with the plain sum."""

    def cost(model: Model, round: Round) -> Cost:
        values = model.lora() + model.sketch()
        return Cost(model.weights(), optimizer(model.lora()), plain_sum(values, round.participants))

    return cost


FORMULAS: dict[str, dict[str, Callable[[Model, Round], Cost]]] = {
    "fedavg_lora": {"client": averaged()},
    "zero3_offload": {"client": averaged()},
    "fs_llm": {"client": averaged(sgd)},
    "fs_llm_offload": {"client": averaged()},
}

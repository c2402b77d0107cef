"""Weights, optimizer state and traffic of every method, as formulas of the model's dimensions.

Written from the methods' descriptions and apart from the code that they are compared with. All sizes are
bytes, for one client (or the server), and traffic is of one round, by the plain sum unless a method has
another.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FP32 = 4
HEAD = 32  # bytes before a participant's part of a sum: number, length, type, weight


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
        count = self.blocks if blocks is None else blocks
        return (count * block + h) * self.number + self.tables()

    def tables(self) -> int:
        """Return the bytes of embedding and head."""
        return self.vocab * self.hidden * (1 if self.tied else 2) * self.number

    def lora(self, blocks: int | None = None) -> int:
        """Return the parameters of LoRA on q and v of so many blocks."""
        count = self.blocks if blocks is None else blocks
        return count * self.rank * (self.hidden + self.hidden + self.hidden + self.kv)

    def sketch(self, blocks: int | None = None) -> int:
        """Return the values of the sketch from which the averaging error is estimated: 16 a matrix."""
        return 16 * 2 * (self.blocks if blocks is None else blocks)


@dataclass(frozen=True)
class Round:
    """What a round consists of.

    Attributes:
        participants: of a sum. clients: of the run. steps: local steps. tokens: of all rows of a client in
            the round, the mean over clients.
    """

    participants: int
    clients: int
    steps: int
    tokens: float


@dataclass(frozen=True)
class Cost:
    """Sizes of one role.

    Attributes:
        weights: of the frozen base. optimizer: masters and moments, fp32. sent: by a client's gateway in a
            round; for a server, by it.
    """

    weights: int
    optimizer: int
    sent: float


Formula = Callable[[Model, Round], Cost]


def plain_sum(values: float, participants: int) -> float:
    """Return the bytes that each participant sends for a sum: its chunks to their owners, its own sum to all,
    and the head of a sum to each other one.
    """
    return 2 * (participants - 1) / participants * values * FP32 + HEAD * (participants - 1)


def adam(parameters: int) -> int:
    """Return the bytes of fp32 masters and two moments."""
    return 3 * FP32 * parameters


def sgd(parameters: int) -> int:
    """Return the bytes of fp32 masters; SGD without momentum has no state."""
    return FP32 * parameters


def averaged(optimizer: Callable[[int], int] = adam) -> Formula:
    """Return the formula of a method that averages all LoRA factors with the plain sum."""

    def cost(model: Model, round: Round) -> Cost:
        values = model.lora() + model.sketch()
        return Cost(model.weights(), optimizer(model.lora()), plain_sum(values, round.participants))

    return cost


def fate(up: int, down: int) -> Formula:
    """Return the formula of a secure sum with so many bytes a value up and down, for the mean participant:
    one of them is the arbiter, which sends the sum to all others.
    """

    def cost(model: Model, round: Round) -> Cost:
        others = round.participants - 1
        sent = (up + down) * model.lora() * others / round.participants
        return Cost(model.weights(), adam(model.lora()), sent)

    return cost


def scaffold(model: Model, round: Round) -> Cost:
    """Return the cost of SCAFFOLD: control variates are as large as what trains."""
    values = 2 * model.lora() + model.sketch() + 1
    return Cost(model.weights(), sgd(model.lora()), plain_sum(values, round.participants))


def fedsa(model: Model, round: Round) -> Cost:
    """Return the cost of FedSA-LoRA: A alone is sent."""
    factors_a = model.blocks * 2 * model.rank * model.hidden
    return Cost(model.weights(), adam(model.lora()), plain_sum(factors_a, round.participants))


def fedkseed(model: Model, round: Round) -> Cost:
    """Return the cost of FedKSeed: K scalars are sent, whatever the model. Of a client's K, those that are
    not zero go up.
    """
    used = min(SEEDS, round.steps)
    up = (round.participants - 1) / round.participants * FP32 * used
    down = plain_sum(SEEDS, round.participants) / 2
    return Cost(model.weights(), sgd(model.lora()), up + down)


def spry(model: Model, round: Round) -> Cost:
    """Return the cost of SPRY: a client sends its slice, and the sum of all slices goes to everybody."""
    share = (round.participants - 1) / round.participants * FP32
    sent = share * (model.lora() / round.clients + model.lora())
    return Cost(model.weights(), adam(model.lora()), sent)


def spry_iteration(model: Model, round: Round) -> Cost:
    """Return the cost of SPRY with an exchange in every step: a derivative and a weight for each unit. A
    client's own are too scattered among those of others for the zeros between them to be left out.
    """
    units = 2 * model.blocks
    sent = round.steps * plain_sum(2 * units, round.participants)
    return Cost(model.weights(), sgd(model.lora()), sent)


def fedbiot_client(model: Model, round: Round) -> Cost:
    """Return the cost of a FedBiOT client: emulator and adapter, of which it trains and sends the latter."""
    values = model.lora(ADAPTER) + model.sketch(ADAPTER)
    return Cost(
        model.weights(emulator(model) + ADAPTER),
        adam(model.lora(ADAPTER)),
        plain_sum(values, round.participants),
    )


def fedbiot_server(model: Model, round: Round) -> Cost:
    """Return the cost of FedBiOT's server: the whole base, LoRA on emulator and adapter, and the state to
    every client in every round. It takes part in the sum, and adds nothing.
    """
    trained = model.lora(emulator(model) + ADAPTER)
    values = model.lora(ADAPTER) + model.sketch(ADAPTER)
    state = FP32 * trained * (round.participants - 1)
    return Cost(model.weights(), adam(trained), plain_sum(values, round.participants) / 2 + state)


def emulator(model: Model) -> int:
    """Return the number of the emulator's blocks."""
    return round((model.blocks - ADAPTER) * (1 - DROPPED))


def split_client(model: Model, round: Round) -> Cost:
    """Return the cost of a client of U-shaped split learning: embedding, one block and head. It sends hidden
    states and gradients of all tokens, and its LoRA.
    """
    boundary = 2 * round.tokens * model.hidden * model.number
    values = model.lora(1) + model.sketch(1) + round.clients
    return Cost(model.weights(1), adam(model.lora(1)), boundary + plain_sum(values, round.participants))


def split_server(model: Model, round: Round) -> Cost:
    """Return the cost of its server: the other blocks, and twice the hidden states of all clients back."""
    boundary = 2 * round.tokens * round.clients * model.hidden * model.number
    blocks = model.blocks - 1
    state = FP32 * model.lora() * (round.participants - 1)
    values = model.lora(1) + model.sketch(1) + round.clients
    return Cost(
        model.weights(blocks) - model.tables(),
        adam(model.lora(blocks)),
        boundary + state + plain_sum(values, round.participants) / 2,
    )


SEEDS = 4096  # of FedKSeed
ADAPTER = 2  # blocks of FedBiOT's adapter
DROPPED = 0.2  # share of the others that its emulator lacks
FORMULAS: dict[str, dict[str, Formula]] = {
    "fedavg_lora": {"client": averaged()},
    "zero3_offload": {"client": averaged()},
    "fs_llm": {"client": averaged(sgd)},
    "fs_llm_offload": {"client": averaged()},
    "fate_llm": {"client": fate(16, 8)},
    "fate_llm compact": {"client": fate(4, 4)},
    "fedprox": {"client": averaged()},
    "scaffold": {"client": scaffold},
    "fedsa": {"client": fedsa},
    "fedkseed": {"client": fedkseed},
    "spry": {"client": spry},
    "spry_iteration": {"client": spry_iteration},
    "fedbiot": {"client": fedbiot_client, "server": fedbiot_server},
    "m2fedsa": {"client": split_client, "server": split_server},
}

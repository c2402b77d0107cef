"""Configuration of the rounds: which clients take part, how updates are combined, and when the run stops."""

from dataclasses import dataclass, field
from typing import Literal

SERVER_LR = {
    "none": 1.0,
    "momentum": 1.0,
    "adam": 0.01,
    "yogi": 0.01,
}  # what `auto` means, by server optimizer


def settled_server_lr(server_lr: float | str, server_optimizer: str) -> float:
    """Return the server optimizer's step size, with the number that `auto` stands for.

    A step of adam or yogi changes each parameter by about the step size, however small the clients' deltas
    are. With 1.0, which is right for plain averaging, such steps would destroy any model.
    """
    return SERVER_LR[server_optimizer] if server_lr == "auto" else float(server_lr)


@dataclass(frozen=True)
class FederationConfig:
    """The keys of the section `federation`, except `method` and `updates`. The types of those two are made of
    the registries of methods and transforms, and `config.run.FederationSection` adds them.
    """

    rounds: int = field(default=10, metadata={"help": "number of rounds", "min": 1, "max": 1_000_000})
    clients_per_round: int = field(
        default=0, metadata={"help": "clients that are sampled for each round, 0: all", "min": 0}
    )
    server_optimizer: Literal["none", "momentum", "adam", "yogi"] = field(
        default="none", metadata={"help": "optimizer that applies the mean update to the global state"}
    )
    server_lr: float | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "step size of the server optimizer; auto: 1.0 for none and momentum, 0.01 for adam and "
            "yogi",
            "above": 0.0,
        },
    )
    server_momentum: float = field(
        default=0.9,
        metadata={"help": "server optimizer: momentum, and beta1 of adam and yogi", "min": 0.0, "below": 1.0},
    )
    server_beta2: float = field(
        default=0.99, metadata={"help": "server optimizer: beta2 of adam and yogi", "min": 0.0, "below": 1.0}
    )
    server_tau: float = field(
        default=1e-3,
        metadata={
            "help": "server optimizer: adaptivity of adam and yogi, added to the denominator",
            "above": 0.0,
        },
    )
    local_optimizer: Literal["reset", "keep"] = field(
        default="reset",
        metadata={"help": "whether the state of the clients' optimizers is reset or kept between rounds"},
    )
    staleness: int = field(
        default=0,
        metadata={
            "help": (
                "1: the updates of a round are exchanged during the local steps of the next round, "
                "which start from the state of one round before plus the client's own latest update"
            ),
            "min": 0,
            "max": 1,
        },
    )
    round_budget: Literal["steps", "seconds", "epoch"] = field(
        default="steps",
        metadata={
            "help": (
                "length of a round. steps: train.local_steps (or train.local_steps_by_cluster); "
                "seconds: as many local steps as each cluster completes in federation.round_seconds, "
                "at most train.local_steps; epoch: as many as each client's own rows take once, also if "
                "these are different numbers (not evened out as with seconds). train.schedule then advances "
                "once a round"
            )
        },
    )
    round_seconds: float = field(
        default=0.0,
        metadata={
            "help": "round_budget=seconds: seconds of local steps in a round",
            "min": 0.0,
            "max": 10_000_000,
        },
    )
    public_rows: str = field(
        default="",
        metadata={
            "help": (
                "rows that the server of a method trains on: a file on the server's host only, as "
                "docs/data.md describes it, with the format and fields of the task's rows"
            ),
            "path": (),
        },
    )
    evaluate_every: int = field(
        default=1, metadata={"help": "rounds between evaluations on held-out rows", "min": 1}
    )
    compare_alone: bool = field(
        default=False,
        metadata={
            "help": (
                "train each client alone at the end, and compare all models on all held-out rows; for "
                "simulations, because every rank reads all rows"
            )
        },
    )
    patience: int = field(
        default=0,
        metadata={
            "help": "stop after this many evaluations without a better held-out loss, 0: never",
            "min": 0,
        },
    )

    @property
    def server_step(self) -> float:
        """Return the step size of the server optimizer, see `settled_server_lr`."""
        return settled_server_lr(self.server_lr, self.server_optimizer)

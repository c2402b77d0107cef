"""Options of the methods `spry` and `spry_iteration` (`federation.method: {name: spry}`)."""

from dataclasses import dataclass, field
from typing import Any, Literal

Problems = list[tuple[tuple[str, ...], str]]


@dataclass(frozen=True)
class ForwardOptions:
    perturbations: int = field(
        default=1,
        metadata={
            "help": "random directions of a local step; each is one forward pass, and their estimates of the "
            "gradient are averaged",
            "min": 1,
            "max": 10_000,
        },
    )
    clients_per_unit: int = field(
        default=1,
        metadata={
            "help": "clients of a round that train each LoRA module, at least; more than one hides single "
            "clients in masked modes",
            "min": 1,
        },
    )
    derivative_clip: float = field(
        default=0.0, metadata={"help": "bound of the derivatives along directions, 0: none", "min": 0.0}
    )
    weighting: Literal["tokens", "equal"] = field(
        default="tokens",
        metadata={"help": "how clients count in the mean of a LoRA module: by their answer tokens, or alike"},
    )

    def problems(self, config: Any) -> Problems:
        """Return the rules of forward gradients that a run's configuration breaks, each as (dotted keys that
        cannot be combined, reason and remedy).

        Args:
            config: of the run (config.run.RunConfig).
        """
        problems: Problems = []
        clients = config.federation.clients_per_round or config.data.clients
        name = config.federation.method.name
        if self.clients_per_unit > clients:
            problems.append((
                ("federation.method", "data.clients"),
                f"federation.method.clients_per_unit={self.clients_per_unit}, but a round has {clients} "
                "clients; choose at most that many",
            ))
        if config.model.dtype == "fp16":
            problems.append((
                ("federation.method", "model.dtype"),
                f"federation.method={name} computes derivatives that overflow in model.dtype=fp16, where no "
                "loss scale bounds them; set model.dtype=bf16 or fp32",
            ))
        if config.routing.between_organisations:
            problems.append((
                ("federation.method", "routing.transport"),
                f"federation.method={name} divides the model over all clients by their numbers, but with "
                f"routing.transport={config.routing.transport} each site numbers its own; use one job, or "
                "choose another method",
            ))
        return problems


@dataclass(frozen=True)
class Config(ForwardOptions):
    name: Literal["spry"] = "spry"

    def problems(self, config: Any) -> Problems:
        problems = super().problems(config)
        if config.routing.anonymous and self.weighting != "equal":
            problems.append((
                ("federation.method", "routing.mode"),
                f"federation.method.weighting={self.weighting} sums the weights of each unit's clients, from "
                "whose many sums the weight of every client follows, which routing.mode="
                f"{config.routing.mode} is to hide; set federation.method.weighting=equal, or "
                "routing.mode=plain inside one trust domain",
            ))
        return problems


@dataclass(frozen=True)
class IterationConfig(ForwardOptions):
    name: Literal["spry_iteration"] = "spry_iteration"

    def problems(self, config: Any) -> Problems:
        problems = super().problems(config)
        required = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0}
        for key, wanted in required.items():
            value = getattr(config.train, key)
            if value != wanted:
                problems.append((
                    ("federation.method", f"train.{key}"),
                    "clients of federation.method=spry_iteration send derivatives instead of taking steps, "
                    f"so that train.{key}={value} would have no effect; set train.{key}={wanted}, and "
                    "federation.server_optimizer as you like",
                ))
        return problems

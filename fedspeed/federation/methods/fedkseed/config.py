"""Options of the method `fedkseed` (`federation.method: {name: fedkseed}`)."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    name: Literal["fedkseed"] = "fedkseed"
    seeds: int = field(
        default=4096,
        metadata={
            "help": "number K of directions that all clients share, and of the values that a client sends",
            "min": 1,
            "max": 1_000_000,
        },
    )
    epsilon: float = field(
        default=5e-4,
        metadata={
            "help": "how far weights are shifted along a direction, to both sides, to measure a slope",
            "above": 0.0,
        },
    )
    perturbations: int = field(
        default=1,
        metadata={"help": "directions of a local step, whose mean is taken", "min": 1, "max": 10_000},
    )
    draws: Literal["own", "common"] = field(
        default="own",
        metadata={
            "help": "which directions clients draw. own: each its own; common: the same in each step of a "
            "round, so that every value of the sum comes from all clients, as masked modes require"
        },
    )

    def problems(self, config: Any) -> list[tuple[tuple[str, ...], str]]:
        """Return the rules of this method that a run's configuration breaks, each as (dotted keys that cannot
        be combined, reason and remedy).

        Args:
            config: of the run (config.run.RunConfig).
        """
        train = config.train
        setting = f"federation.method={self.name}"
        found: list[tuple[tuple[str, ...], str]] = []
        for key, value, wanted, remedy in (
            ("train.optimizer", train.optimizer, "sgd", "sgd, with a smaller lr"),
            ("train.momentum", train.momentum, 0, "0"),
            ("train.weight_decay", train.weight_decay, 0, "0"),
            ("train.clip", train.clip, 0, "0"),
            ("adapter.dropout", config.adapter.dropout, 0, "0"),
        ):
            if value != wanted:
                text = (
                    f"{setting} takes zero-order steps along random directions, without gradients, so that "
                    f"{key}={value} would have no effect; set {key}={remedy}, or choose another method"
                )
                found.append((("federation.method", key), text))
        if config.data.packing:
            text = (
                f"{setting} compares losses of rows that are evaluated, and packed rows cannot be; set "
                "data.packing=false, or choose another method"
            )
            found.append((("federation.method", "data.packing"), text))
        if self.draws == "own" and config.routing.sums_only:
            text = (
                "federation.method.draws=own lets one client alone send a number of the sum, which "
                f"routing.mode={config.routing.mode} is to hide; set federation.method.draws=common, or "
                "routing.mode=plain inside one trust domain"
            )
            found.append((("federation.method", "routing.mode"), text))
        if self.draws == "common" and train.local_steps_by_cluster:
            text = (
                "federation.method.draws=common has all clients take the same steps, but "
                "train.local_steps_by_cluster gives clusters different numbers of them; leave it out, or set "
                "federation.method.draws=own"
            )
            found.append((("federation.method", "train.local_steps_by_cluster"), text))
        return found

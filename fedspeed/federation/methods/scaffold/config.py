"""The configurations that the method `scaffold` can be combined with."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    name: Literal["scaffold"] = "scaffold"

    def problems(self, config: Any) -> list[tuple[tuple[str, ...], str]]:
        """Return the rules of this method that a run's configuration breaks, each as (dotted keys that cannot
        be combined, reason and remedy).

        A control variate is (start - end) / (sum of the learning rates of the steps), which is a mean of
        gradients for plain SGD only. Weight decay of SGD is allowed: it is the gradient of a part of the
        loss, and so is in the mean. Schedules of the learning rate are, too, because its sum is used.

        Args:
            config: of the run (config.run.RunConfig).
        """
        train = config.train
        federation = config.federation
        setting = f"federation.method={self.name}"
        found: list[tuple[tuple[str, ...], str]] = []
        for key, value, wanted, why, remedy in (
            ("optimizer", train.optimizer, "sgd", "does not step along gradients", "sgd, with a larger lr"),
            ("momentum", train.momentum, 0, "counts gradients several times", "0"),
            ("clip", train.clip, 0, "shortens them", "0"),
        ):
            if value != wanted:
                text = (
                    f"{setting} computes a client's mean gradient from the change of its weights, but "
                    f"train.{key}={value} {why}; set train.{key}={remedy}, or choose another method"
                )
                found.append((("federation.method", f"train.{key}"), text))
        if not train.lr:
            text = f"{setting} divides the change of weights by train.lr, which is 0; give a rate above 0"
            found.append((("federation.method", "train.lr"), text))
        if federation.updates:
            names = ", ".join(update.name for update in federation.updates)
            text = (
                f"federation.updates ({names}) changes what clients send, but {setting} needs the mean of "
                "what they keep; leave federation.updates out, or choose another method"
            )
            found.append((("federation.method", "federation.updates"), text))
        if config.routing.between_organisations and config.data.clients > 1:
            text = (
                f"{setting} needs the number of all sites' clients, but a site knows its own "
                f"data.clients={config.data.clients} only; set data.clients=1 on every site, or choose "
                "another method"
            )
            found.append((("federation.method", "data.clients"), text))
        return found

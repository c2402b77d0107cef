"""What a step of distillation has measured. Without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DistilSums:
    """Sums over the tokens of a step of distillation, prompt and answer, before the step is taken
    (engine.distillation).

    Attributes:
        hidden: of relative squared errors. kl: of divergences, 0 where they have no part in the loss.
        tokens: their number, without padding.
    """

    hidden: float = 0.0
    kl: float = 0.0
    tokens: int = 0

    def __add__(self, other: "DistilSums") -> "DistilSums":
        return DistilSums(self.hidden + other.hidden, self.kl + other.kl, self.tokens + other.tokens)

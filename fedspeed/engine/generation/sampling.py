"""Choose the next token of a row from its logits: greedily, or at random.

A random choice depends on nothing but the logits and (seed, prompt, sample, position): so it is the same in
whatever batch, on whatever rank and with whatever tier a row is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedspeed.data import streams
from fedspeed.errors import FedSpeedError


@dataclass(frozen=True)
class Draw:
    """Which random number a choice takes: that of a prompt and its sample, both counted over the whole call,
    and of the position of the new token in the answer. All count from 0.
    """

    prompt: int
    sample: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A rule by which tokens are chosen.

    Attributes:
        temperature: what logits are divided by; 0 chooses the most likely token.
        top_p: only the most likely tokens are drawn from, as few as have this probability together (nucleus
            sampling, Holtzman et al., 2020).
        seed: of all random numbers.

    Raises:
        FedSpeedError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise FedSpeedError(f"temperature={self.temperature}: must be 0 (the most likely token) or more")
        if not 0 < self.top_p <= 1:
            raise FedSpeedError(f"top_p={self.top_p}: must be more than 0 and at most 1 (all tokens)")

    def choose(self, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """Choose a token for each row of logits [k, vocabulary] fp32; returns [k] int64 on their device."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.double() / self.temperature, -1)
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        reached = ordered.cumsum(-1)
        # A token is drawn from if those before it have less than top_p.
        mass = torch.where(reached - ordered < self.top_p, ordered, 0.0).sum(-1, keepdim=True)
        at = torch.from_numpy(self.random_numbers(draws)).to(logits.device).unsqueeze(-1) * mass
        found = torch.searchsorted(reached, at, right=True)
        last = (reached - ordered < self.top_p).sum(-1, keepdim=True) - 1
        return tokens.gather(-1, torch.minimum(found, last)).squeeze(-1)

    def random_numbers(self, draws: Sequence[Draw]) -> np.ndarray:
        """Draw the random numbers of some choices, [k] float64, uniform in [0, 1)."""
        keys = ([self.seed, streams.GENERATION, draw.prompt, draw.sample, draw.position] for draw in draws)
        return np.array([np.random.default_rng(key).random() for key in keys])

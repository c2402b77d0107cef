"""`fedkseed`: zero-order steps along K directions that all participants can draw, of which only the lengths
are sent (FedKSeed, Qin et al., ICML 2024).

In a local step a client draws one of the K directions, z_j ~ N(0, I), and measures the slope of its loss
along it, rho = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps). It steps w -= lr rho z_j, and adds lr rho to its
amount a_j. It sends its K amounts, whatever the number of weights. Everybody computes the new state from
their weighted mean: w - sum_j a_j z_j. Steps are linear in the directions, so this is the weighted mean of
the clients' weights.

With `draws=own` an amount of the sum may come from one client alone, whose slope along z_j it then reveals
together with its learning rate; masked modes refuse that. With `draws=common`, where clients draw the same
directions in each step, every amount is a sum over all clients.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedspeed import activity
from fedspeed.data.batches import StepBatches
from fedspeed.engine.directions import direction, direction_seed
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Aggregate, Method
from fedspeed.federation.methods.turns import Trained, Turn, TurnTrainer
from fedspeed.planner.plan import Task

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine, Sums

AMOUNTS = "seeds:amounts"  # [K] float64, in the end of a turn
_DIRECTIONS = 0x5EED  # random streams: the seeds of the K directions,
_DRAWS = 0xD4A  # and which of them are drawn
_SEED_BITS = 63  # a pipeline passes seeds on as int64


def stepped(arrays: Mapping[str, np.ndarray], amounts: Iterable[tuple[int, float]]) -> Arrays:
    """Return `w - sum_j a_j z_j` of all arrays w, float32. The sum is rounded before it is subtracted, so
    that an array is rounded once, however many directions there are.

    Args:
        amounts: (seed of the direction z_j, a_j).
    """
    listed = list(amounts)
    new = {}
    for name, array in arrays.items():
        change = np.zeros(array.shape, np.float32)
        for seed, amount in listed:
            change += np.float32(amount) * direction(seed, name, array.shape)
        new[name] = array - change
    return new


class FedKSeed(Method):
    """The summed vector has the clients' weighted amounts of the K directions. Losses are the means of those
    on both sides, without dropout.
    """

    needs = frozenset({"perturb"})

    @classmethod
    def min_holders(cls, config: Any, participants: Mapping[int, int], modules: int) -> int:
        """Return the smallest number of participants that contribute to an amount that is not zero: one where
        each client draws its own directions, which no other may have drawn.
        """
        return len(set(participants.values())) if config.draws == "common" else 1

    @classmethod
    def planned(cls, config: Any, task: Task, *, role: Literal["client", "server"]) -> Task | None:
        return replace(task, differentiated_blocks=0) if role == "client" else None

    def values(self, round: int) -> int:
        return int(self.config.seeds)

    def passes(self, engine: "ClientEngine", turns: int, steps: int, accumulation: int) -> tuple[int, bool]:
        """Return the number of forward passes: one for each micro-batch on each side of a direction."""
        return turns * steps * self.config.perturbations * 2 * accumulation, False

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        """Train turns one after the other, since engines evaluate in the first client slot."""
        return [self._trained(engine, turn, trainer) for turn in turns]

    def _trained(self, engine: "ClientEngine", turn: Turn, trainer: TurnTrainer) -> Trained:
        from fedspeed.engine.client_engine import Sums

        now = {name: turn.start[name] for name in self.layout.names}
        amounts = np.zeros(self.config.seeds)
        total = Sums()
        with trainer.shown_progress([turn]):
            for number in range(turn.steps):
                drawn = self.drawn(turn, number)
                batches = trainer.rows(turn, number)
                with engine.measured():
                    probes = [self._probe(engine, now, batches, self.seed_of(j)) for j in drawn]
                engine.end_step()
                done = sum((sums for _, sums in probes), Sums())
                slopes = np.array([slope for slope, _ in probes])
                taken = bool(np.isfinite(slopes).all())
                if taken:
                    steps = trainer.lr(turn, number) * slopes / len(drawn)
                    np.add.at(amounts, drawn, steps)
                    now = stepped(now, [(self.seed_of(j), float(step)) for j, step in zip(drawn, steps)])
                share = 1 / (2 * len(drawn))  # of each evaluation in the step's mean loss
                step_sums = Sums(done.loss * share, round(done.tokens * share), steps=int(taken))
                total += step_sums
                trainer.stepped([turn], number, [step_sums])
        return Trained(end=now | {AMOUNTS: amounts}, sums=total, memory=turn.memory)

    def drawn(self, turn: Turn, number: int) -> list[int]:
        """Return the numbers of the directions of a turn's local step `number`."""
        common = [self.seed, _DRAWS, turn.round, number]
        key = common if self.config.draws == "common" else [turn.seed, _DRAWS, number]
        rng = np.random.default_rng(key)
        return list(map(int, rng.integers(self.config.seeds, size=self.config.perturbations)))

    def seed_of(self, number: int) -> int:
        """Return the seed of direction `number`."""
        return direction_seed([self.seed, _DIRECTIONS, number], bits=_SEED_BITS)

    def _probe(
        self, engine: "ClientEngine", now: Arrays, batches: StepBatches, seed: int
    ) -> "tuple[float, Sums]":
        """Measure the slope of a step's mean loss along a direction, over all ranks of the client. The exact
        weights are loaded for each direction: shifting them there and back would round them every time.

        Returns:
            (the slope, this rank's sums of both evaluations).
        """
        from fedspeed.federation.tensors import as_torch

        epsilon = self.config.epsilon
        engine.load(as_torch(now))
        engine.perturb(0, seed, epsilon)
        plus = self._evaluated(engine, batches)
        engine.perturb(0, seed, -2 * epsilon)
        minus = self._evaluated(engine, batches)
        of_client = engine.sum_over_client(np.array([plus.loss, minus.loss], np.float64))
        losses = of_client / max(1, batches.step_answer_tokens)
        return float((losses[0] - losses[1]) / (2 * epsilon)), plus + minus

    def _evaluated(self, engine: "ClientEngine", batches: StepBatches) -> "Sums":
        """Return this rank's sums of a step's batches, each in a pass of its own, as `passes` counts them."""
        with activity.uncounted():  # an engine counts batches, and the progress display local steps
            first, *others = [engine.evaluate([[batch]])[0] for batch in batches.micro]
        return sum(others, first)

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        return (weight * end[AMOUNTS]).astype(np.float32)

    def aggregate(
        self,
        state: Arrays,
        total: np.ndarray,
        weight: float,
        *,
        round: int,
        exchange: int = 0,
        factor: float = 1.0,
    ) -> Aggregate:
        mean = factor * total.astype(np.float64) / weight
        used = np.flatnonzero(mean)
        return Aggregate(stepped(state, [(self.seed_of(int(j)), float(mean[j])) for j in used]), None)

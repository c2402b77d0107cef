"""`fedbiot`: clients fine-tune the last blocks of a model whose other blocks they have only in part (FedBiOT,
Wu et al., KDD 2024).

The last `adapter_blocks` blocks are the adapter. Of the other blocks clients have a share, the emulator, and
the server has all. Clients train the LoRA of the adapter behind the emulator, and the server averages it, as
`lora_average` does. Before round 1 and after each round the server trains the LoRA of the emulator on public
rows, so that emulator and adapter do what the full model does with that adapter (engine.distillation). The
new emulator is part of the state, so that every client computes with it in the next round.

Clients evaluate the adapter behind the emulator. What is exported is the adapter alone, for the full model.

docs/baselines/fedbiot.md says what of the original is kept, repaired and left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedspeed.config.deepspeed import zero_stage
from fedspeed.data.clients import ClientData
from fedspeed.engine.capabilities import Capability
from fedspeed.engine.spec import EngineSpec
from fedspeed.errors import ConfigError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import VALUE_BYTES, Traffic
from fedspeed.federation.methods.fedbiot.arrays import blocks_of, from_state, to_state
from fedspeed.federation.methods.fedbiot.emulator import divide
from fedspeed.federation.methods.fedbiot.proximal import proximal_gradient
from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.methods.turns import Trained, Turn, TurnTrainer
from fedspeed.log import LOG
from fedspeed.models.catalogue import ModelShape
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.folded import trainable
from fedspeed.planner.plan import Task

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine

ALIGNMENT_STREAM = 0xB107  # the random stream of dropout in alignments


class FedBiOT(LoraAverage):
    """Averages the adapter's LoRA. The optimizer of an alignment begins anew in every round, so that a round
    depends on the state only, and can be repeated.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset({"gradients", "add_to_gradients"})
    server_needs: ClassVar[frozenset[Capability]] = frozenset({"distil"})
    evaluated: ClassVar[str] = (
        "the adapter behind the emulator, as clients have them, and not of the full model with the exported "
        "adapter"
    )

    @classmethod
    def spec(cls, config: Any, spec: EngineSpec, *, shape: ModelShape) -> EngineSpec:
        """Return the engine of a role. The server's has all blocks and always a stock engine, whatever tier
        clients have.

        Raises:
            ModelError: the base has too few blocks, or no module that adapter.targets names in its blocks.
            ConfigError: ZeRO-3 would partition the server's parameters.
        """
        division = divide(shape.layers, adapter_blocks=config.adapter_blocks, dropped=config.dropped)
        prefix = FAMILIES[shape.family].blocks
        linears = shape.adapted(spec.adapter.targets)

        def adapted(blocks: Sequence[int]) -> EngineSpec:
            targets = tuple(f"{prefix}{block}.{linear.path}" for block in blocks for linear in linears)
            return replace(spec, adapter=replace(spec.adapter, targets=targets))

        if spec.role == "client":
            return replace(adapted(division.adapter), blocks=division.kept)
        if zero_stage(spec.deepspeed) == 3:
            raise ConfigError(
                "the server of federation.method=fedbiot computes with whole parameters, but the DeepSpeed "
                "section partitions them (zero_optimization.stage=3); set "
                "deepspeed.zero_optimization.stage=2, and engine.tier=ram for clients whose device does not "
                "hold the emulator"
            )
        return replace(adapted(division.kept), engine=replace(spec.engine, tier="stock"))

    @classmethod
    def arrays_of(cls, config: Any, arrays: Arrays, *, role: Literal["client", "server"]) -> Arrays:
        return arrays if role == "client" else to_state(arrays, config.adapter_blocks)

    @classmethod
    def planned(cls, config: Any, task: Task, *, role: Literal["client", "server"]) -> Task | None:
        """Return the task of a client, which has some of the blocks and differentiates the adapter's, or of
        the server, which trains LoRA on the same blocks of the whole base.
        """
        kept = divide(task.shape.layers, adapter_blocks=config.adapter_blocks, dropped=config.dropped).kept
        if role == "server":
            return replace(task, adapted_blocks=len(kept))
        return replace(
            task,
            shape=replace(task.shape, layers=len(kept)),
            adapted_blocks=config.adapter_blocks,
            differentiated_blocks=config.adapter_blocks,
        )

    def traffic(self, task: Task, participants: int) -> Traffic:
        """Predict the bytes of a client, which also receives the whole state from the server."""
        sent, received = super().traffic(task, participants)
        blocks = divide(
            task.shape.layers, adapter_blocks=self.config.adapter_blocks, dropped=self.config.dropped
        )
        values = task.shape.lora(task.targets, task.lora_rank) * len(blocks.kept) // task.shape.layers
        return Traffic(sent, received + VALUE_BYTES * values)

    def passes(self, engine: "ClientEngine", turns: int, steps: int, accumulation: int) -> tuple[int, bool]:
        reads = int(self.config.proximal > 0)
        return engine.train_passes(turns, steps, accumulation, reads=reads), True

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        """Train turns with the proximal term in their losses."""
        weight = self.config.proximal
        if not weight:
            return trainer.local_steps(engine, turns)

        from fedspeed.models.adapters import lora_scale

        def add_proximal(slot: int, turn: Turn) -> None:
            now = {name: tensor.numpy() for name, tensor in engine.masters(slot).items()}
            engine.add_to_gradients(
                slot, proximal_gradient(now, turn.start, lora_scale(engine.model)), weight
            )

        return trainer.local_steps(engine, turns, between=add_proximal)

    def server_step(
        self,
        state: Arrays,
        engine: "ClientEngine",
        public_rows: ClientData | None,
        *,
        round: int,
        exchange: int,
        trainer: TurnTrainer,
    ) -> Arrays:
        """Return the state with the emulator aligned to the full model with the state's adapter."""
        from fedspeed.federation.tensors import as_arrays, as_torch

        config = self.config
        steps = config.alignment_steps if round else config.initial_alignment_steps
        if not steps:
            return state
        emulator, adapter = blocks_of(engine.names, config.adapter_blocks)
        engine.load(
            as_torch(from_state(state, engine.names)),
            frozen=frozenset(trainable(state)),
            seed=self._alignment_seed(round, engine.data_share[1]),
        )
        lr = trainer.round_lr(round) if config.alignment_lr == "auto" else config.alignment_lr
        first = config.initial_alignment_steps + (round - 1) * steps if round else 0
        losses = []
        for number in range(first, first + steps):
            sums = engine.distil(
                trainer.public_batches(number), student=emulator, common=adapter[0], kl=config.kl
            )
            engine.step(lr)
            losses.append(np.array([sums.hidden, sums.kl, sums.tokens], dtype=np.float64))
        _log_losses(engine, round, losses[0], losses[-1])
        return to_state(as_arrays(engine.state()), config.adapter_blocks)

    def exports(self, state: Arrays, memory: Mapping[int, Arrays]) -> dict[str, Arrays]:
        """Return the adapter without the emulator, which has no part in the full model."""
        return {"adapter": trainable(state)}

    def _alignment_seed(self, round: int, share: int) -> int:
        """Return the seed of dropout in a round's alignment on one of the server's ranks."""
        return int(np.random.SeedSequence([self.seed, ALIGNMENT_STREAM, round, share]).generate_state(1)[0])


def _log_losses(engine: "ClientEngine", round: int, first: np.ndarray, last: np.ndarray) -> None:
    """Log what an alignment's first and last step have measured before they were taken. Collective over the
    server's ranks.

    Args:
        first, last: sums of a rank over its tokens: of relative errors and of divergences, and the tokens.
    """
    means = []
    for sums in (first, last):
        hidden, kl, tokens = engine.sum_over_client(sums)
        means.append((hidden / tokens, kl / tokens))
    if engine.data_share[1] == 0:
        (hidden, kl), (hidden_after, kl_after) = means
        LOG.info(
            f"alignment of the emulator in round {round}: relative error {hidden:.4g} to {hidden_after:.4g}, "
            f"divergence {kl:.4g} to {kl_after:.4g}"
        )

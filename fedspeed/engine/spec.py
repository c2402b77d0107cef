"""The arguments of `build_engine`: which engine to build, and where. Without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedspeed.config.run import RunConfig
from fedspeed.data.config import TrainConfig
from fedspeed.engine.capabilities import Kind, kind_of
from fedspeed.engine.clock import Clock
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.models.saved_adapter import outside_blocks


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Describe the engine to build.

    Attributes:
        deepspeed: DeepSpeed section; values that depend on the model may be `auto`.
        blocks: the decoder blocks to build, in ascending order; None: all. The others are neither read nor
            computed, and parameters keep the names that they have in the whole model.
        role: of the rank that builds the engine.
        part: of a model that is split between ranks, the part to build. ends: embedding, the first and the
            last of the model's blocks, final norm and head; body: the blocks between. `blocks` names them.
    """

    model: ModelConfig
    adapter: AdapterConfig
    train: TrainConfig
    engine: EngineConfig
    deepspeed: dict
    blocks: tuple[int, ...] | None = None
    role: Literal["client", "server"] = "client"
    part: Literal["whole", "ends", "body"] = "whole"

    @classmethod
    def of(
        cls, config: RunConfig, deepspeed: dict, role: Literal["client", "server"] = "client"
    ) -> "EngineSpec":
        """Return the spec that a run's configuration asks for."""
        return cls(
            model=config.model,
            adapter=config.adapter,
            train=config.train,
            engine=config.engine,
            deepspeed=deepspeed,
            role=role,
        )

    @property
    def kind(self) -> Kind:
        """The kind of engine, as far as the configuration alone decides it. Whether a pattern of adapter
        targets matches modules outside the decoder blocks, which needs a stock engine, is known with the
        model only.
        """
        if self.part != "whole":
            return "split"
        frozen = self.adapter.method != "full"
        return kind_of(self.engine, self.deepspeed, frozen=frozen, outside=outside_blocks(self.adapter))


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """Describe the rank that builds the engine.

    Attributes:
        client_sets: cluster ranks of each client, the same list on every rank of the cluster.
        clock: counts seconds by stage (monitor.clock.StageClock).
        nvme: folder of this rank alone for offloaded tensors.
        seed: of random weights and the adapter's initial values.
        clients: number of clients on this rank.
        sharers: number of ranks that share this rank's device; on a CPU, the ranks of its host.
    """

    client_sets: list[tuple[int, ...]]
    clock: Clock
    nvme: Path
    seed: int
    clients: int = 1
    sharers: int = 1

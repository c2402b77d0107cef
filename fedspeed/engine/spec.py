"""What engine is to be built, and where: all that `build_engine` is told. Without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedspeed.config.run import RunConfig
from fedspeed.data.config import TrainConfig
from fedspeed.engine.capabilities import Kind, kind_of
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.models.saved_adapter import outside_blocks


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What is to be built.

    Attributes:
        deepspeed: plain DeepSpeed configuration; `auto` is still allowed where only the model knows.
        blocks: the decoder blocks that the model has, in ascending order; None: all. The others are neither
            read nor computed, and parameters keep the names that they have in the whole model.
        role: of the rank that builds it.
    """

    model: ModelConfig
    adapter: AdapterConfig
    train: TrainConfig
    engine: EngineConfig
    deepspeed: dict
    blocks: tuple[int, ...] | None = None
    role: Literal["client", "server"] = "client"

    @classmethod
    def of(
        cls, config: RunConfig, deepspeed: dict, role: Literal["client", "server"] = "client"
    ) -> "EngineSpec":
        """Make what a run's configuration asks for."""
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
        """The kind of engine, as far as the configuration tells: an adapter whose pattern of targets reaches
        outside the decoder blocks is known with the model only, and makes a stock engine of a streamed
        one.
        """
        frozen = self.adapter.method != "full"
        return kind_of(self.engine, self.deepspeed, frozen=frozen, outside=outside_blocks(self.adapter))


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """Where it is built.

    Attributes:
        client_sets: cluster ranks of the clients, the same list on every rank of the cluster.
        clock: what `gather` and `compute` seconds are accounted to (monitor.clock.StageClock).
        nvme: folder of this rank alone for offloaded tensors.
        seed: of what is drawn (random weights, an adapter's start).
        clients: how many clients this rank carries.
        sharers: ranks that compute on this rank's device, or on its host where that is the device.
    """

    client_sets: list[tuple[int, ...]]
    clock: object
    nvme: Path
    seed: int
    clients: int = 1
    sharers: int = 1

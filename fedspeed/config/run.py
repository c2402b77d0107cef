"""The whole configuration of one run: it only composes what the rooms own."""

from dataclasses import dataclass, field

from fedspeed.checkpoint.config import CheckpointConfig
from fedspeed.cluster.config import ClusterConfig
from fedspeed.data.config import DataConfig, TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.federation.config import FederationConfig
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.monitor.config import MonitorConfig
from fedspeed.routing.config import RoutingConfig


@dataclass(frozen=True)
class RunSection:
    name: str = field(default="", metadata={"help": "folder of the run under run.out; empty: the name of the YAML"})
    out: str = field(default="runs", metadata={"help": "folder that holds the runs"})
    seed: int = field(default=0, metadata={"help": "seed of everything random", "min": 0, "max": 2**32 - 1})


@dataclass(frozen=True)
class RunConfig:
    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deepspeed: dict = field(default_factory=dict, metadata={
        "help": "plain DeepSpeed configuration: base: FILE.json, and keys that override it; auto: FedSpeed decides"})

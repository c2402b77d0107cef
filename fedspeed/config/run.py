"""The configuration of a run, composed of the sections that the other packages define."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Union

from fedspeed.checkpoint.config import CheckpointConfig
from fedspeed.cluster.config import ClusterConfig
from fedspeed.config.fields import variants
from fedspeed.data.config import DataConfig, TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.evaluation.config import EvaluationConfig
from fedspeed.federation.config import FederationConfig
from fedspeed.federation.methods.config import METHODS
from fedspeed.federation.methods.config import variant_of as variant_of_method
from fedspeed.federation.updates.config import UPDATES
from fedspeed.federation.updates.config import variant_of as variant_of_update
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.monitor.config import MonitorConfig
from fedspeed.routing.config import RoutingConfig


class NamedOptions(Protocol):
    """The options of a method or a transform: a dataclass with a name."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class RunSection:
    """The section `run`."""

    name: str = field(
        default="", metadata={"help": "folder of the run below run.out; empty: the name of the YAML"}
    )
    out: str = field(default="runs", metadata={"help": "folder that holds the runs"})
    seed: int = field(default=0, metadata={"help": "seed of all random numbers", "min": 0, "max": 2**32 - 1})


def _variants(names: Iterable[str], variant_of: Callable[[str], type]) -> dict[str, type]:
    """Return the variants of a tagged union by name.

    Raises:
        ValueError: a variant is registered under another name than its own.
    """
    by_name = {name: variant_of(name) for name in names}
    for name, variant in by_name.items():
        if (own_name := ", ".join(variants(variant))) != name:
            raise ValueError(
                f"{variant.__module__}: `name` is {own_name!r}, but it is registered as {name!r}"
            )
    return by_name


METHOD_VARIANTS = _variants(METHODS, variant_of_method)
UPDATE_VARIANTS = _variants(UPDATES, variant_of_update)
if TYPE_CHECKING:

    class _Method(Protocol):
        """What the variants, which are known at run time only, have in common."""

        @property
        def name(self) -> str: ...

    _Update = _Method
else:
    _Method = Union[tuple(METHOD_VARIANTS.values())]  # noqa: UP007
    _Update = Union[tuple(UPDATE_VARIANTS.values())]  # noqa: UP007


@dataclass(frozen=True)
class FederationSection(FederationConfig):
    """The section `federation`: the fields of its room and the registered methods and transforms."""

    method: _Method = field(
        default=METHOD_VARIANTS["lora_average"](),
        metadata={
            "help": "how clients train and what becomes of their updates: {name: flexlora}, or the name "
            "alone; "
            "some have options of their own"
        },
    )
    updates: tuple[_Update, ...] = field(
        default=(),
        metadata={
            "help": "what is done to a client's update before it leaves, in this order, such as "
            "[{name: clip, norm: 1.0}]"
        },
    )


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run: one field a section."""

    run: RunSection = field(
        default_factory=RunSection, metadata={"help": "The run itself: its name, its place, its seed."}
    )
    model: ModelConfig = field(
        default_factory=ModelConfig, metadata={"help": "The base model that is fine-tuned."}
    )
    adapter: AdapterConfig = field(default_factory=AdapterConfig, metadata={"help": "What is trained of it."})
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata={"help": "Whose text: the task, how its rows become clients, and how a row becomes tokens."},
    )
    train: TrainConfig = field(
        default_factory=TrainConfig, metadata={"help": "A client's local work in a round."}
    )
    federation: FederationSection = field(
        default_factory=FederationSection,
        metadata={"help": "The rounds: who takes part, how updates are combined, when to stop."},
    )
    cluster: ClusterConfig = field(
        default_factory=ClusterConfig,
        metadata={"help": "How clients lie on the ranks that the launcher provides."},
    )
    engine: EngineConfig = field(
        default_factory=EngineConfig,
        metadata={
            "help": "How a rank executes its clients: where the frozen base lives, and what is recomputed."
        },
    )
    routing: RoutingConfig = field(
        default_factory=RoutingConfig,
        metadata={"help": "How updates travel between clients, and who may see them."},
    )
    evaluation: EvaluationConfig = field(
        default_factory=EvaluationConfig,
        metadata={"help": "Evaluation tasks on the common model while the run goes on."},
    )
    monitor: MonitorConfig = field(
        default_factory=MonitorConfig, metadata={"help": "What is shown and written while a run goes on."}
    )
    checkpoint: CheckpointConfig = field(
        default_factory=CheckpointConfig,
        metadata={"help": "What is kept of a run, so that the same command resumes it."},
    )
    deepspeed: dict = field(
        default_factory=dict,
        metadata={
            "help": "Plain DeepSpeed configuration: base names a JSON file, other keys override it; auto: "
            "FedSpeed decides."
        },
    )

    @property
    def has_server(self) -> bool:
        """Whether the method has a server, which runs on a host of its own."""
        return METHODS[self.federation.method.name].server

"""What the planner is asked, and what it answers. Values only; bytes are bytes, times are seconds."""

import math
from dataclasses import dataclass, field
from functools import cached_property

from fedspeed.cluster.topology import Topology
from fedspeed.models.families.shape import ModelShape
from fedspeed.planner.hardware import GIB, Node
from fedspeed.schedule.limits import QUANTISED

STREAMED = ("ram", "client", "nvme", "cluster")
SLOTTED = (*STREAMED, *QUANTISED)  # tiers whose blocks are computed with in slots
TIERS = ("stock", "resident", *SLOTTED)
ACTIVATION_DIGITS = 5  # behind the point, of engine.activation_gib
TYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Task:
    """What shall be trained.

    Attributes:
        tokens: length of every sequence; padding counts, so this is the longest.
        rows: sequences of one optimizer step on each rank, train.micro_batch * train.accumulation. A plan may
            divide them otherwise, which does not change the step.
        micro_batch: sequences of one forward and backward, None where the plan chooses.
        answer_share: part of the tokens that carry loss; the head computes only these.
        stage: ZeRO stage of what trains.
        offload: whether the ranks' shares of a divided base wait in host RAM.
        quantised: whether a base in 8 or 4 bits will do; it gives other losses.
        staleness: rounds by which an update may be late.
        matmul: arithmetic of matrix products, as engine.matmul.
        cleared: words that take back what the run's configuration says of the engine and a plan does not.
    """

    shape: ModelShape
    clients: int
    tokens: int = 512
    rows: int = 4
    micro_batch: int | None = None
    dtype: str = "bf16"
    method: str = "lora"
    lora_rank: int = 8
    targets: str | tuple[str, ...] = "attention"
    dropout: float = 0.0
    optimizer: str = "adamw"
    local_steps: int = 10
    answer_share: float = 0.5
    stage: int = 0
    offload: bool = False
    quantised: bool = False
    cleared: tuple[str, ...] = ()
    staleness: int = 0
    matmul: str = "default"
    folded_rank: int = 0  # what the method's folded adapter has grown to when the run ends, at most

    @cached_property
    def trainable(self) -> int:
        """Parameters that train."""
        return self.shape.total if self.method == "full" else self.shape.lora(self.targets, self.lora_rank)

    @property
    def type_bytes(self) -> int:
        return TYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Setting:
    """One way to execute a task: the engine's settings, and how a step's rows are divided into micro-batches.

    Attributes:
        activation_bytes: device memory for activations of blocks that are then not computed again; stock
            keeps all of them unless `checkpointing`.
    """

    tier: str
    micro_batch: int
    accumulation: int
    resident_blocks: int = 0
    block_slots: int = 2
    client_slots: int = 1
    block_inputs: str = "host"
    checkpointing: bool = False
    activation_bytes: int = 0

    @property
    def overrides(self) -> tuple[str, ...]:
        """The same as `key=value` of a run."""
        keys = [f"engine.tier={self.tier}"]
        if self.tier == "stock":
            keys += [f"engine.activation_checkpointing={str(self.checkpointing).lower()}"]
        else:
            keys += [
                f"engine.client_slots={self.client_slots}",
                f"engine.block_inputs={self.block_inputs}",
                f"engine.activation_gib={self._activation_gib:.{ACTIVATION_DIGITS}f}",
            ]
        if self.tier in SLOTTED:
            keys += [
                f"engine.resident_blocks={self.resident_blocks}",
                f"engine.block_slots={self.block_slots}",
            ]
        return (*keys, f"train.micro_batch={self.micro_batch}", f"train.accumulation={self.accumulation}")

    @property
    def _activation_gib(self) -> float:
        """Round up, by 10 kB at most, so that what fits into the bytes fits into this."""
        return math.ceil(self.activation_bytes / GIB * 10**ACTIVATION_DIGITS) / 10**ACTIVATION_DIGITS


@dataclass(frozen=True)
class RankProfile:
    """A rank, as far as its memory and time depend on where it stands. Ranks that are alike have equal
    profiles.

    Attributes:
        ranks_here: ranks that work on its node and share its RAM, disk and link.
        client_ranks, client_nodes: of each of its clients.
        cluster_ranks, cluster_nodes: ranks and nodes of its cluster.
        carried: clients on the rank.
        participants: gateways of the whole run, which exchange updates; those of this node.
    """

    node: Node
    ranks_here: int
    client_ranks: int
    cluster_ranks: int
    cluster_nodes: int
    carried: int
    participants: int
    participants_here: int
    client_nodes: int = 1


@dataclass(frozen=True)
class Memory:
    """Peak bytes by cause: `gpu` of one rank, `ram` and `nvme` of a whole node."""

    gpu: dict[str, int] = field(default_factory=dict)
    ram: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def ram_bytes(self) -> int:
        return sum(self.ram.values())

    @property
    def nvme_bytes(self) -> int:
        return sum(self.nvme.values())


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step of every client of a rank.

    Attributes:
        causes: what the step's time is made of; they add up.
        loads: how long loading takes in all; what of it is not in `causes["waiting for loads"]` is hidden
            behind arithmetic.
        exchange: of one round's exchange of updates; not part of the step.
    """

    causes: dict[str, float]
    loads: float
    exchange: float

    @property
    def total(self) -> float:
        return sum(self.causes.values())

    @property
    def waited(self) -> float:
        return self.causes.get("waiting for loads", 0.0)

    @property
    def hidden(self) -> float:
        return max(0.0, self.loads - self.waited)


@dataclass(frozen=True)
class Forecast:
    """What a setting costs on the ranks of one cluster: the memory of its fullest rank, the time of its
    slowest.
    """

    cluster: str
    memory: Memory
    seconds: Seconds
    tightest: RankProfile


@dataclass(frozen=True)
class Alternative:
    """A way that was weighed and lost. `seconds` is None where it does not fit."""

    label: str
    reason: str
    setting: Setting | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ClusterPlan:
    """A cluster under the common setting, and the setting it would take by itself."""

    name: str
    profiles: tuple[RankProfile, ...]
    forecast: Forecast
    preferred: Setting
    preferred_forecast: Forecast


@dataclass(frozen=True)
class Plan:
    """The answer. A run has one engine section, so that `setting` is common to all clusters."""

    task: Task
    topology: Topology
    setting: Setting
    clusters: tuple[ClusterPlan, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        return overrides(self.task, self.setting)


def overrides(task: Task, setting: Setting) -> tuple[str, ...]:
    """What to put behind a run's command, or into its YAML."""
    stage = ("deepspeed.zero_optimization.stage=0",) if setting.tier == "stock" and task.stage == 3 else ()
    return (f"model.dtype={task.dtype}", *setting.overrides, *stage, *task.cleared)

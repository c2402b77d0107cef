"""Input and output of the planner: tasks, settings, predictions and plans.

Sizes are bytes, times are seconds.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

from fedspeed.cluster.topology import Topology
from fedspeed.models.families.shape import ModelShape
from fedspeed.planner.hardware import GIB, Node
from fedspeed.schedule.limits import QUANTISED

STREAMED = ("ram", "client", "nvme", "cluster")
SLOTTED = (*STREAMED, *QUANTISED)  # tiers that load or dequantise blocks into slots
TIERS = ("stock", "resident", *SLOTTED)
ACTIVATION_DIGITS = 5  # decimals of engine.activation_gib
TYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Task:
    """The training that is to be planned.

    Attributes:
        tokens: length of every sequence; since rows are padded, that of the longest.
        rows: sequences of one optimizer step on each rank, train.micro_batch * train.accumulation. A plan may
            divide them into other micro-batches, which does not change the step.
        micro_batch: sequences of one forward and backward pass; None: the plan chooses. answer_share: share
            of the tokens that contribute to the loss; the head computes only these. stage: ZeRO stage of the
            trainable parameters. offload: whether the ranks' shares of a divided base are stored in host RAM.
            quantised: whether a base in 8 or 4 bits may be proposed, which gives other losses. staleness:
            rounds by which an update may be late. matmul: arithmetic of matrix products, as engine.matmul.
            logits_mib: logits that are computed at a time, as engine.logits_mib.
            cleared: overrides that a plan adds to those of its setting, such as resets of engine keys that it
            does
            not use.
        folded_rank: the largest rank that the method's folded adapter reaches by the end of the run.
        adapted_blocks: number of blocks with an adapter; None: all.
        differentiated_blocks: number of last blocks that a backward pass reaches; None: all. 0: a local step
            has forward passes only.
        tangents: whether forward passes carry a tangent with every value (forward-mode derivatives).
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
    logits_mib: int | str = "auto"
    folded_rank: int = 0
    adapted_blocks: int | None = None
    differentiated_blocks: int | None = None
    tangents: bool = False

    @cached_property
    def trainable(self) -> int:
        """Return the number of trainable parameters."""
        if self.method == "full":
            return self.shape.total
        blocks = self.shape.layers if self.adapted_blocks is None else self.adapted_blocks
        return self.shape.lora(self.targets, self.lora_rank) * blocks // self.shape.layers

    @property
    def type_bytes(self) -> int:
        """Return the bytes of a number of the base."""
        return TYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Setting:
    """One execution of a task: the engine's settings, and the division of a step's rows into micro-batches.

    Attributes:
        activation_bytes: device memory for kept activations, which need not be recomputed. Stock keeps all of
            them unless `checkpointing`.
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
        """Return the setting as `key=value` overrides of a run's configuration."""
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
        """Return the activation budget in GiB, rounded up by at most 10 kB so that it keeps no less."""
        return math.ceil(self.activation_bytes / GIB * 10**ACTIVATION_DIGITS) / 10**ACTIVATION_DIGITS


@dataclass(frozen=True)
class RankProfile:
    """The facts of a rank that its memory and time depend on. Ranks that are alike have equal profiles.

    Attributes:
        ranks_here: training ranks on its node, which share its RAM, disk and link.
        client_ranks: ranks of each of its clients.
        client_nodes: nodes of each of its clients.
        cluster_ranks: ranks of its cluster.
        cluster_nodes: nodes of its cluster.
        carried: clients on the rank.
        participants: gateways of the whole run, which exchange updates.
        participants_here: gateways on its node.
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
    """Peak bytes by cause: `gpu` for one rank, `ram` and `nvme` for a whole node."""

    gpu: dict[str, int] = field(default_factory=dict)
    ram: dict[str, int] = field(default_factory=dict)
    nvme: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_bytes(self) -> int:
        """Return the peak bytes on one rank's GPU."""
        return sum(self.gpu.values())

    @property
    def ram_bytes(self) -> int:
        """Return the peak bytes of a node's RAM."""
        return sum(self.ram.values())

    @property
    def nvme_bytes(self) -> int:
        """Return the peak bytes of a node's disk."""
        return sum(self.nvme.values())


@dataclass(frozen=True)
class Seconds:
    """Seconds of one optimizer step of every client of a rank.

    Attributes:
        causes: the parts of the step's time, by cause. loads: the duration of all loads. The part of it that
            is not in `causes["waiting for loads"]` is hidden
            behind arithmetic.
        exchange: one round's exchange of updates, which is not part of the step.
    """

    causes: dict[str, float]
    loads: float
    exchange: float

    @property
    def total(self) -> float:
        """Return the seconds of the whole step."""
        return sum(self.causes.values())

    @property
    def waited(self) -> float:
        """Return the seconds of loads that the arithmetic waits for."""
        return self.causes.get("waiting for loads", 0.0)

    @property
    def hidden(self) -> float:
        """Return the seconds of loads that are hidden behind arithmetic."""
        return max(0.0, self.loads - self.waited)


@dataclass(frozen=True)
class Forecast:
    """The predicted cost of a setting on one cluster.

    Attributes:
        memory: of the rank with least memory to spare.
        seconds: of the slowest rank.
        tightest: the profile of the rank with least memory to spare.
    """

    cluster: str
    memory: Memory
    seconds: Seconds
    tightest: RankProfile


@dataclass(frozen=True)
class Alternative:
    """A rejected setting and the reason; `seconds` of its step is None if it does not fit."""

    label: str
    reason: str
    setting: Setting | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ClusterPlan:
    """A cluster under the common setting, and the setting that would be fastest for it alone."""

    name: str
    profiles: tuple[RankProfile, ...]
    forecast: Forecast
    preferred: Setting
    preferred_forecast: Forecast


@dataclass(frozen=True)
class Plan:
    """The fastest setting for a task. A run has one engine section, so all clusters have the same setting."""

    task: Task
    topology: Topology
    setting: Setting
    clusters: tuple[ClusterPlan, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the plan as `key=value` overrides of a run's configuration."""
        return overrides(self.task, self.setting)


def overrides(task: Task, setting: Setting) -> tuple[str, ...]:
    """Return a task's setting as `key=value` overrides for a run's command line or its YAML."""
    stage = ("deepspeed.zero_optimization.stage=0",) if setting.tier == "stock" and task.stage == 3 else ()
    return (f"model.dtype={task.dtype}", *setting.overrides, *stage, *task.cleared)

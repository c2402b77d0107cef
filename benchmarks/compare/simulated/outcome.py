"""What a method takes for a case: memory, seconds of a step, a round and an epoch, tokens a second. Pure.

A round is as long as its slowest client: all wait for one another in the exchange. Clients have equal numbers
of rows, so that an epoch is a number of rounds, which need not be whole.
"""

from dataclasses import dataclass, replace

from benchmarks.compare.simulated import memory, steps
from benchmarks.compare.simulated.cases import WITHOUT_BATCH, Case, Placement, placed
from benchmarks.compare.simulated.exchange import exchange_s
from benchmarks.compare.simulated.memory import Need, need_of
from fedspeed.federation.methods.base import method_class
from fedspeed.planner.plan import Memory, RankProfile, Setting, Task

PUBLISHED = "as published"
PUBLISHED_BATCH = "same rows, its published micro-batch"
BEST = "same rows, its best micro-batch"
ONE_ROW = "same rows, micro-batches of one row"  # with which a method needs the least memory
VARIANTS = (PUBLISHED, PUBLISHED_BATCH, BEST)


@dataclass(frozen=True)
class Division:
    """The rows of a step on a rank: `accumulation` micro-batches of `micro_batch` rows."""

    micro_batch: int
    accumulation: int


@dataclass(frozen=True)
class Outcome:
    """What a method takes for a case.

    Attributes:
        division: of a step's rows on a rank. needs: by role or kind of card.
        steps: seconds of a local step by cause, by kind of card.
        clients, rows, tokens: of the run; of a client in a step; of a row.
        local_steps: of a round. in_turn: whether clients train one after the other.
        exchange, server: seconds after the local steps of a round. first: seconds before round 1.
        epoch: rows of an epoch of all clients. staleness: whether the exchange is hidden behind steps.
    """

    method: str
    variant: str
    setting: str
    division: Division
    needs: dict[str, Need]
    steps: dict[str, dict[str, float]]
    clients: int
    rows: int
    tokens: int
    local_steps: float
    epoch: int
    in_turn: float = 0.0
    exchange: float = 0.0
    server: float = 0.0
    first: float = 0.0
    staleness: bool = False

    @property
    def fits(self) -> bool:
        """Return whether every rank has what it needs."""
        return all(need.fits for need in self.needs.values())

    @property
    def shortage(self) -> str:
        """Return what does not fit, and what it needs."""
        return "; ".join(f"{who} {need.shortage}" for who, need in self.needs.items() if need.shortage)

    @property
    def device_bytes(self) -> int:
        """Return the peak of a client's fullest device."""
        return max(need.device for who, need in self.needs.items() if who != "server")

    @property
    def step(self) -> float:
        """Return the seconds of a step of the slowest client."""
        return max(sum(causes.values()) for causes in self.steps.values())

    @property
    def train(self) -> float:
        """Return the seconds of a round's local steps."""
        return self.local_steps * (self.in_turn or self.step)

    @property
    def round(self) -> float:
        """Return the seconds of a round."""
        if self.staleness:
            return max(self.train, self.exchange) + self.server
        return self.train + self.exchange + self.server

    @property
    def round_tokens(self) -> float:
        """Return the tokens of all clients in a round."""
        return self.clients * self.rows * self.tokens * self.local_steps

    @property
    def training_rate(self) -> float:
        """Return the tokens/s of all clients together during local steps."""
        return self.round_tokens / self.train

    @property
    def rate(self) -> float:
        """Return the tokens/s of all clients together over whole rounds."""
        return self.round_tokens / self.round

    @property
    def hours(self) -> float:
        """Return the hours of an epoch from start to end."""
        rounds = self.epoch / (self.clients * self.rows * self.local_steps)
        return (self.first + rounds * self.round) / 3600


def variants_of(method: str) -> tuple[str, ...]:
    """Return the variants of a method; where nothing is published about its batch, one."""
    return (BEST,) if method in WITHOUT_BATCH else VARIANTS


def outcomes(method: str, case: Case, variant: str) -> Outcome:
    """Return what a baseline takes; of several divisions of a step's rows the fastest one that fits, or if
    none does, the one that needs the least device memory.

    Raises:
        FedSpeedError: the method cannot train this model.
    """
    placement = placed(method, case, published=variant == PUBLISHED)
    found = [
        _outcome(method, case, variant, placement, division)
        for division in _divisions(method, case, variant, placement)
    ]
    fitting = [one for one in found if one.fits]
    if fitting:
        return min(fitting, key=lambda one: one.hours)
    return min(found, key=lambda one: max(need.device for need in one.needs.values()))


def _divisions(method: str, case: Case, variant: str, placement: Placement) -> list[Division]:
    train = placement.config.train
    if variant == PUBLISHED:
        return [Division(train.micro_batch, train.accumulation)]
    if variant == ONE_ROW:
        return [Division(1, case.rows)]
    divisors = [size for size in range(1, case.rows + 1) if case.rows % size == 0]
    if variant == PUBLISHED_BATCH:
        divisors = [max(size for size in divisors if size <= train.micro_batch)]
    return [Division(size, case.rows // size) for size in divisors]


def _outcome(method: str, case: Case, variant: str, placement: Placement, division: Division) -> Outcome:
    options = placement.config.federation.method
    client = method_class(method).planned(options, placement.task, role="client")
    assert client is not None, "every method has clients"
    setting = steps.stock_setting(
        division.micro_batch, division.accumulation, checkpointing=method == "zero3_offload"
    )
    if method == "fedavg_lora":
        setting = Setting("resident", division.micro_batch, division.accumulation, block_inputs="device")
    rows = division.micro_batch * division.accumulation * placement.client_ranks
    local_steps: float = placement.config.train.local_steps
    if placement.config.federation.round_budget == "epoch":
        local_steps = case.epoch / case.clients / rows
    whole = Outcome(
        method,
        variant,
        f"{division.accumulation} x {division.micro_batch} rows a rank",
        division,
        needs={
            kind: need_of(_memory(method, client, setting, rank), rank)
            for kind, rank in placement.kinds.items()
        },
        steps={
            kind: _step(method, client, setting, rank, placement) for kind, rank in placement.kinds.items()
        },
        clients=case.clients,
        rows=rows,
        tokens=case.tokens,
        local_steps=local_steps,
        epoch=case.epoch,
        exchange=exchange_s(placement, max(1, round(local_steps))),
    )
    return _with_server(whole, placement, setting)


def _memory(method: str, task: Task, setting: Setting, rank: RankProfile) -> Memory:
    if method in ("zero3_offload", "fs_llm_offload"):
        return memory.offloaded(task, setting, rank)
    if method == "fate_llm":
        return memory.optimizer_on_host(task, setting, rank)
    return memory.resident(task, setting, rank)


def _step(
    method: str, task: Task, setting: Setting, rank: RankProfile, placement: Placement
) -> dict[str, float]:
    options = placement.config.federation.method
    if method in ("zero3_offload", "fs_llm_offload"):
        return steps.offloaded(task, setting, rank)
    if method == "fate_llm":
        return steps.optimizer_on_host(task, setting, rank)
    if method in ("spry", "spry_iteration"):
        return steps.forward_mode(task, setting, rank, options.perturbations)
    if method == "fedbiot":
        return steps.emulator(task, setting, rank)
    if method == "m2fedsa":
        assert placement.server is not None, "M2FedSA has a server"
        return steps.split_step(task, _server_task(method, placement), setting, rank, placement.server)
    return steps.resident(task, setting, rank)


def _server_task(method: str, placement: Placement) -> Task:
    task = method_class(method).planned(placement.config.federation.method, placement.task, role="server")
    assert task is not None, f"{method} has a server"
    return task


def _with_server(whole: Outcome, placement: Placement, setting: Setting) -> Outcome:
    """Add what a server needs, and the seconds in which clients wait for it."""
    server = placement.server
    if server is None:
        return whole
    task = _server_task(whole.method, placement)
    if whole.method == "m2fedsa":
        joint = replace(setting, micro_batch=setting.micro_batch * placement.client_ranks)
        needs = whole.needs | {"server": need_of(memory.resident(task, joint, server), server)}
        turns = [sum(whole.steps[rank.node.device.name].values()) * rank.carried for rank in placement.ranks]
        return replace(whole, needs=needs, in_turn=sum(turns) / placement.client_ranks)
    # An alignment's batch is one row, as published, whatever clients' batches are.
    one = steps.stock_setting(1, 1, checkpointing=False)
    options = placement.config.federation.method
    alignment = sum(steps.alignment_step(task, one, server).values())
    return replace(
        whole,
        needs=whole.needs | {"server": need_of(memory.alignment(task, one, server), server)},
        server=options.alignment_steps * alignment,
        first=options.initial_alignment_steps * alignment,
    )

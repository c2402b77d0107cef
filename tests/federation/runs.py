"""Whole federations on tiny models in worlds of real processes, with real engines and a real exchange."""

import contextlib
import gc
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np

from fedspeed.data.clients import ClientData
from fedspeed.data.encode import Example
from fedspeed.models.lora_ranks import client_ranks, of_rank
from tests.processes import free_port, run_clusters, run_ranks
from tests.tiny import run_config

DEADLINE_S = 150  # of a machine that is busy with others
ROWS = (11, 5, 7)  # training rows of clients 0, 1, 2: different, so that an unweighted mean differs
VOCAB = 64


def tiny_llama(folder) -> str:
    """Write a tiny base in a process of its own, so that the test process needs no torch."""
    return run_ranks(1, _write_llama, folder)[0]


def _write_llama(rank, folder):
    from tests.tiny import write_llama

    return write_llama(folder, hidden=32, intermediate=48, heads=2, kv_heads=1, vocab=VOCAB)


def client_data(client: int, val_rows: int = 3) -> ClientData:
    """Return rows that are a function of the client's number: prompts and answers of different lengths."""
    rng = np.random.default_rng([7, client])

    def example() -> Example:
        length = int(rng.integers(6, 17))
        return Example(
            rng.integers(3, VOCAB, length).astype(np.int32), labels_start=int(rng.integers(1, length - 2))
        )

    return ClientData(
        [example() for _ in range(ROWS[client])], [example() for _ in range(val_rows)], pad_id=0
    )


def share_of(client: int) -> float:
    """Return the weight of a client: the answer tokens of its training rows."""
    return float(sum(len(e.input_ids) - e.labels_start for e in client_data(client).train))


def settings(
    base: str,
    *,
    clients: int = 3,
    dtype: str = "fp32",
    train: dict | None = None,
    adapter: dict | None = None,
    **sections,
):
    """A configuration of short rounds."""
    return run_config(
        model={"base": base, "dtype": dtype},
        data={"clients": clients},
        train={
            "local_steps": 2,
            "micro_batch": 2,
            "optimizer": "sgd",
            "momentum": 0.9,
            "lr": 0.1,
            **(train or {}),
        },
        adapter={"targets": "all-linear", "lora_rank": 4, "alpha": 8.0, **(adapter or {})},
        **sections,
    )


def stirred(tensors: dict) -> dict:
    """Return start values with a B that is not zero, so that A has a gradient from the first step on."""
    rng = np.random.default_rng(3)
    return {
        n: (t + 0.1 * rng.standard_normal(t.shape)).astype(np.float32) for n, t in sorted(tensors.items())
    }


def largest(a: dict, b: dict) -> float:
    """Return the largest difference between two states."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[n] - b[n].astype(np.float64)).max()) for n in a)


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


class Notes:
    """A monitor that keeps every record, and the trained weights at the end of every turn."""

    def __init__(self):
        self.records = []
        self.turns = []
        self.engine = None
        self.steps = []

    def step(self, round_number, local_step, local_steps, loss=None):
        self.steps.append((round_number, local_step, local_steps))
        if local_step == local_steps:
            self.turns.append({n: t.detach().numpy() for n, t in self.engine.state().items()})

    def round(self, record):
        self.records.append(record)


@dataclass(frozen=True)
class World:
    """The position of a rank: the sizes of all torch worlds, its number over all of them, and their common
    store.
    """

    clusters: tuple[int, ...]
    rank: int
    store: object

    @property
    def cluster(self) -> int:
        return int(np.searchsorted(np.cumsum(self.clusters), self.rank, side="right"))

    @property
    def neighbours(self) -> range:
        """World ranks of this cluster."""
        first = sum(self.clusters[: self.cluster])
        return range(first, first + self.clusters[self.cluster])


def run_worlds(clusters: tuple[int, ...], function, *args, **named) -> list:
    """Return `[function(World, *args)]` of all ranks, each in the torch world of its cluster."""
    return run_clusters(list(clusters), _in_world, clusters, free_port(), function, *args, **named)


def _in_world(rank, clusters, port, function, *args, **named):
    import torch
    from torch.distributed import TCPStore

    from fedspeed.engine.world import join_world, leave_world, quiet

    torch.set_num_threads(1)
    quiet()
    # DeepSpeed collects garbage for every ZeRO-3 engine, which is slow over all imported modules.
    gc.freeze()
    store = TCPStore(
        "127.0.0.1", port, sum(clusters), is_master=rank == 0, timeout=timedelta(seconds=DEADLINE_S)
    )
    join_world(DEADLINE_S)
    try:
        result = function(World(clusters, rank, store), *args, **named)
    finally:
        leave_world()
    store.set(f"done/{rank}", "1")
    if rank == 0:  # the store lives in this process
        store.wait([f"done/{r}" for r in range(sum(clusters))], timedelta(seconds=DEADLINE_S))
    return result


@dataclass(frozen=True)
class Federated:
    """One rank's parts of a run, and its journal."""

    parts: object  # federation.rank_components.RankComponents
    journal: object

    @property
    def config(self):
        return self.parts.config

    @property
    def role(self):
        return self.parts.role

    @property
    def engine(self):
        return self.parts.engine

    @property
    def link(self):
        return self.parts.link

    def run(self, progress):
        from fedspeed.federation import rounds

        rounds.baseline(self.parts, progress)
        return rounds.run(self.parts, progress)

    def baseline(self, progress):
        from fedspeed.federation import rounds

        rounds.baseline(self.parts, progress)


@contextlib.contextmanager
def federation(
    world: World,
    name: str,
    config,
    carries: dict[int, tuple[int, ...]],
    folder,
    *,
    kind: str = "zero0",
    notes=None,
    watch=lambda exchange: exchange,
    stop=lambda: False,
    base_partition: str = "cluster",
    val_rows: int = 3,
    key=None,
    marks=None,
    **facts,
):
    """Build the `Federated` of this rank.

    Args:
        name: of the run and its exchange, the same on all ranks, and unique.
        carries: clients of each world rank that takes part; neighbours with the same clients are the ranks of
            these clients.
        watch: wraps the exchange. key, marks: see `exchange_over`.
        facts: more fields of this rank's RankRole.
    """
    from torch.distributed import PrefixStore

    from fedspeed.checkpoint.journal import Journal
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.evaluation.held_out import HeldOut
    from fedspeed.federation.link import ClientLink
    from fedspeed.federation.rank_components import RunServices, assemble, own_arrays, run_method
    from fedspeed.federation.recorder import StopSignals
    from fedspeed.federation.role import RankRole
    from fedspeed.monitor.clock import StageClock
    from fedspeed.net.interfaces import LOOPBACK, interface_of
    from fedspeed.routing.transports.gloo import GlooTransport
    from fedspeed.routing.transports.local import LocalTransport
    from tests.engine.engines import compute_in, ds_config, options_of

    compute_in(config.model.dtype)

    ranks = sorted(carries)
    mine = carries[world.rank]
    here = {r - world.neighbours.start: carries[r] for r in world.neighbours}
    sets = [tuple(r for r in here if here[r] == c) for c in dict.fromkeys(here.values())]
    speakers = [next(r for r in ranks if carries[r] == c) for c in dict.fromkeys(carries[r] for r in ranks)]
    clock = StageClock()
    notes = notes or Notes()
    adapter = config.adapter
    if adapter.rank_by_client:
        lora_ranks = client_ranks(adapter, config.data.clients)
        adapter = of_rank(adapter, max(lora_ranks[client] for client in mine))
    # Clipping is DeepSpeed's own default.
    spec = EngineSpec(
        model=config.model,
        adapter=adapter,
        train=config.train,
        engine=options_of(kind, EngineConfig(base_partition=base_partition)),
        deepspeed=ds_config(kind, config.model.dtype, gradient_clipping=config.train.clip),
    )
    context = EngineContext(
        client_sets=sets,
        clock=clock,
        nvme=Path(folder) / f"nvme-{world.rank}",
        seed=config.run.seed,
        clients=len(mine),
    )
    engine = build_engine(spec, context)
    notes.engine = engine
    exchange = None
    if world.rank in speakers:
        transport = (
            LocalTransport.set_of(1)[0]
            if len(speakers) == 1
            else GlooTransport(
                PrefixStore(name, world.store),
                speakers.index(world.rank),
                len(speakers),
                DEADLINE_S,
                interfaces=interface_of(LOOPBACK),
            )
        )
        exchange = watch(exchange_over(transport, config, key, marks))
    role = RankRole(
        clients={c: client_data(c, val_rows) for c in mine},
        worker_index=ranks.index(world.rank),
        ranks=len(ranks),
        gateway=exchange is not None,
        reporter=world.rank == ranks[0],
        cluster=f"cluster{world.cluster}",
        **facts,
    )
    journal = Journal(Path(folder) / name, 2)
    services = RunServices(
        journal=journal,
        fingerprint="marks",
        record={},
        monitor=notes,
        clock=clock,
        peak_bytes=lambda: 1,
        signals=StopSignals(stop),
    )
    link = ClientLink(engine, exchange, DEADLINE_S)
    method = run_method(config, own_arrays(config, engine))
    yield Federated(
        assemble(
            config,
            role,
            engine,
            link,
            method=method,
            services=services,
            evaluators=[HeldOut(config.train, role)],
        ),
        journal,
    )
    if exchange is not None:
        exchange.close()


def exchange_over(transport, config, key=None, marks=None):
    """Return the exchange of a run's routing mode, plain by default.

    Args:
        key, marks: of a site, whose private key and settled marks outlive a start; None: new ones.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedspeed.routing.anonymous.exchange import AnonymousExchange, exchange_public_keys
    from fedspeed.session.participant import make_plain_exchange

    routing = config.routing
    if routing.mode in ("auto", "plain"):
        return make_plain_exchange(
            replace(config, routing=replace(routing, deadline_s=DEADLINE_S)), transport, None
        )
    key = key or Ed25519PrivateKey.generate()
    roster = exchange_public_keys(transport, DEADLINE_S, key)
    return AnonymousExchange(transport, routing, key, roster, b"run", marks=marks)


def begin(fed: Federated):
    """Return the start of a run, with a B that is not zero."""
    from fedspeed.federation.rank_components import own_arrays, start
    from fedspeed.models.folded import trainable

    progress = start(fed.config, own_arrays(fed.config, fed.engine), fed.parts.method)
    progress.state |= stirred(trainable(progress.state))
    return progress


def from_journal(fed: Federated):
    """Return the progress that a new process resumes from the journal."""
    from fedspeed.session.resume import resume

    return resume(
        fed.config, fed.link, journal=fed.journal, entry=fed.journal.latest(), role=fed.role, fresh=begin(fed)
    )


@dataclass
class Course:
    """The results of a run on one rank: global arrays at the start and after every round, what `Notes`
    recorded, and the journal's best state.
    """

    states: list[dict]
    records: list
    turns: list[dict]
    done: str
    best_round: int
    best: dict | None


def course(
    world: World, name: str, config, carries, folder, *, kind: str = "zero0", notes=None, **options
) -> Course:
    """Run all rounds; asked to stop after each, so that the state between them can be seen."""
    notes = notes or Notes()
    with federation(
        world,
        name,
        config,
        carries=carries,
        folder=folder,
        kind=kind,
        notes=notes,
        stop=lambda: True,
        **options,
    ) as fed:
        progress = begin(fed)
        states = [progress.state]
        while not progress.done:
            progress = fed.run(progress)
            states.append(progress.state)
        best = fed.journal.load_best(progress.best_round) if fed.role.reporter and progress.has_best else None
    return Course(
        states, notes.records, notes.turns, done=progress.done, best_round=progress.best_round, best=best
    )

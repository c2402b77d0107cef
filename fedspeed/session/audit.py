"""`fedspeed audit`: measures what a coalition can learn from the anonymous exchange of real updates.

It is a simulation in one process: it trains every client in turn, which nobody could do in a real federation.
The adversary gets only what the coalition would see, never single updates.
"""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedspeed import activity
from fedspeed.config.load import Loaded
from fedspeed.config.run import RunConfig
from fedspeed.data.clients import ClientData, client_rows, encode_client
from fedspeed.data.config import MAX_STEPS
from fedspeed.engine.world import join_world, leave_world, quiet
from fedspeed.errors import ConfigError, FedSpeedError
from fedspeed.federation import server_optimizer
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.contribution import Contribution, is_usable
from fedspeed.federation.methods.base import Method
from fedspeed.federation.role import RankRole
from fedspeed.federation.updates.base import make_transforms
from fedspeed.models.positions import check_length
from fedspeed.models.tokenizer import load_tokenizer
from fedspeed.monitor.clock import StageClock
from fedspeed.routing.anonymous.bounds import norm_bound
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.anonymous.traffic import traffic
from fedspeed.routing.audit.adversary import (
    Coalition,
    View,
    compromised,
    link,
    named_share,
    observe,
    timing_auc,
    traced_share,
)
from fedspeed.routing.audit.linkers import LINKERS
from fedspeed.routing.audit.payload import encoded
from fedspeed.routing.config import MODES
from fedspeed.session.audit_lies import (
    LiesFinding,
    LossFinding,
    liars_of,
    measure_loss,
    play_lies,
    render_lies,
)
from fedspeed.session.engine_spec import engine_spec
from fedspeed.session.numeric_type import with_local_dtype
from fedspeed.session.request import RunRequest

if TYPE_CHECKING:  # it loads torch
    from fedspeed.engine.client_engine import ClientEngine


@dataclass(frozen=True)
class Finding:
    """The success of a coalition against one routing mode.

    Attributes:
        mode: as in routing.mode.
        rows: (linker, accuracy, advantage, upper 95 % bound of the advantage).
        games: pairs of rounds that were linked.
        traced: share of the cells that the coalition's relays followed from their source.
        formula: the same share by the formula.
        named: share of the cells that the coalition's masks attribute to a member, and the share by chance.
        timing: area under the ROC curve of an attacker who uses the order of arrival.
        even: whether the bytes between members were independent of the data.
    """

    mode: str
    rows: tuple[tuple[str, float, float, float], ...]
    games: int
    traced: float
    formula: float
    named: tuple[float, float]
    timing: float
    even: bool


@dataclass
class Audit:
    """The result of an audit.

    Attributes:
        clients, rounds, values, task: its size.
        findings: by mode, of a coalition that only looks on.
        lies: by mode that hides anything, of one that lies; empty if fewer than two clients are honest.
        loss: what two rounds tell of a client that is lost between them; None without two rounds.
    """

    clients: int
    rounds: int
    values: int
    task: str
    findings: list[Finding] = field(default_factory=list)
    lies: list[LiesFinding] = field(default_factory=list)
    loss: LossFinding | None = None


def audit(
    loaded: Loaded,
    rounds: int,
    values: int,
    modes: Sequence[str],
    coalition: Coalition | None,
    *,
    seed: int = 0,
) -> Audit:
    """Train the clients of a configuration and attack the exchange of their updates.

    Args:
        rounds: number of rounds to train and exchange.
        values: number of values of each client's vector to exchange, drawn once.
        modes: routing modes to attack.
        coalition: the adversary; None for all owners of chunks and no relay.
        seed: of the choice of values and of the linkers.

    Raises:
        ConfigError: there are too few clients.
        FedSpeedError: a run of the configuration would be refused.
    """
    config = loaded.config
    if config.data.clients < 3:
        raise ConfigError(
            f"data.clients={config.data.clients}: an audit needs at least 3 clients, or there is nobody to "
            "confuse a client with; add data.clients=3, or more, to the command: the rows are then divided"
        )
    if config.has_server:
        raise ConfigError(
            f"federation.method={config.federation.method.name} has a server, which an audit does not "
            "simulate; choose another method"
        )
    liars = liars_of(coalition, config.data.clients)
    coalition = coalition or Coalition(frozenset(range(config.data.clients)))
    unknown = sorted(
        m for m in coalition.owners | coalition.relays | coalition.clients if not 0 <= m < config.data.clients
    )
    if unknown:
        raise ConfigError(
            f"no client {', '.join(map(str, unknown))}: there are {config.data.clients}, numbered from 0"
        )
    loaded = with_local_dtype(loaded)
    check_length(config.model.base, config.data.max_tokens)
    updates, weights = train(loaded, rounds, values, seed)
    found = Audit(
        config.data.clients, rounds, updates[0].shape[1], f"{config.data.task}, split {config.data.split}"
    )
    for mode in modes:
        found.findings.append(play_all(mode, updates, coalition, config, seed))
        if liars and MODES[mode].anonymous:
            found.lies.append(play_lies(mode, updates[-1], weights, config.routing, liars))
    found.loss = measure_loss(updates, liars, config.routing)
    return found


def train(loaded: Loaded, rounds: int, values: int, seed: int) -> tuple[list[np.ndarray], list[float]]:
    """Train the clients of a run, and return the values that they exchange, and their weights.

    Args:
        rounds: number of rounds. values: number of coordinates of each client's vector, at most all of them.
        seed: of the choice of coordinates, which is the same in every exchange.

    Returns:
        for each exchange [clients, values] float32, already multiplied by the weights; weights by client.
    """
    from fedspeed.engine.build import EngineContext, build_engine
    from fedspeed.federation.rank_components import own_arrays, run_method, weights_of

    config = loaded.config
    tokenizer = load_tokenizer(config.model)
    data = {
        c: encode_client(rows, tokenizer, config.data)
        for c, rows in enumerate(client_rows(config.data, config.run.seed))
    }
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )  # any port: nobody else joins
    quiet()
    join_world(600)
    try:
        with tempfile.TemporaryDirectory() as folder:
            spec = engine_spec(config, RunRequest(loaded).deepspeed, "client")
            context = EngineContext(
                client_sets=[(0,)], clock=StageClock(), nvme=Path(folder), seed=config.run.seed
            )
            with contextlib.closing(build_engine(spec, context)) as engine:
                method = run_method(config, own_arrays(config, engine))
                least = min(method.values(number) for number in range(1, rounds + 1))
                chosen = np.sort(np.random.default_rng(seed).permutation(least)[:values])
                updates = list(_sent(config, engine, method, data, rounds=rounds, chosen=chosen))
                return updates, list(weights_of(RankRole(clients=data)).values())
    finally:
        leave_world()


def _sent(
    config: RunConfig,
    engine: "ClientEngine",
    method: Method,
    data: Mapping[int, ClientData],
    *,
    rounds: int,
    chosen: np.ndarray,
) -> Iterator[np.ndarray]:
    """Train all clients one after the other, round by round; yield the values of each exchange.

    Args:
        data: encoded rows by client. chosen: coordinates [values] of the vector.

    Yields:
        [clients, values] float32.
    """
    from fedspeed.federation.rank_components import own_arrays, start, weights_of
    from fedspeed.federation.tensors import as_torch
    from fedspeed.federation.trainer import Trainer

    role = RankRole(clients=data)
    progress = start(config, own_arrays(config, engine), method)
    trainer = Trainer(config, role, engine, method)
    weights = weights_of(role)
    chain = make_transforms(config.federation.updates) or None
    memory: dict[int, Arrays] = {}
    at_most = MAX_STEPS if trainer.exchanges == 1 else 1
    all_steps = rounds * sum(map(trainer.steps_of, data))
    with activity.during("the training of the clients", all_steps, "local step"):
        for number, exchange in itertools.product(range(1, rounds + 1), range(trainer.exchanges)):
            state = progress.state
            engine.load_folded(as_torch(state))
            turns = [
                trainer.turn(
                    client, number, state, steps=at_most, exchange=exchange, memory=memory.get(client)
                )
                for client in data
            ]
            contributions = {client: Contribution.empty(method.values(number)) for client in data}
            for turn, trained in itertools.chain.from_iterable(trainer.train(turns)):
                if is_usable(trained):
                    weight = weights[turn.client]
                    contributions[turn.client].add(
                        method, turn, trained, start=state, weight=weight, transform=chain
                    )
                    memory[turn.client] = trained.memory
            vectors = [contribution.vector for contribution in contributions.values()]
            yield np.stack([vector[chosen] for vector in vectors])
            total = reduce(np.add, vectors)
            total_weight = sum(contribution.weight for contribution in contributions.values())
            if total_weight <= 0:
                raise FedSpeedError(
                    f"round {number}: no client's update is finite; lower train.lr, or set train.clip"
                )
            target = method.aggregate(state, total, total_weight, round=number, exchange=exchange).state
            progress.moments, progress.state = server_optimizer.update(
                config.federation, progress.moments, state, target, method.frozen(number)
            )


def play_all(
    mode: str, updates: Sequence[np.ndarray], coalition: Coalition, config: RunConfig, seed: int
) -> Finding:
    """Exchange the updates of all rounds in one mode, and attack it with the coalition's linkers."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    n, values = updates[0].shape
    identities = [Ed25519PrivateKey.generate() for _ in range(n)]
    # A plain sum shows owners of chunks the same as cells without masks and relays.
    chosen = MODES[mode]
    routing = config.routing
    hops = min(routing.relays, n - 1) if chosen.mixed else 0
    keys = tuple(public_bytes(key) for key in identities)

    def members(number: int, update: np.ndarray) -> list[Member]:
        parameters = PublicParameters(
            keys,
            values,
            b"audit",
            attempt=number,
            masked=chosen.masked,
            relays=hops,
            chunk_length=-(-values // n),
            cipher=routing.cipher,
            threshold=n // 2 + 1,
        )
        span = sum(norm_bound(row) for row in update)
        payloads = [encoded(row, span) for row in update]
        return [Member(parameters, i, identities[i], partial(payloads.__getitem__, i)) for i in range(n)]

    views: list[View] = []
    for number, update in enumerate(activity.counted(updates, f"the exchange by {mode}", "round")):
        views.append(observe(members(number, update), coalition))
    with activity.during(f"the linking of what the coalition has seen of {mode}"):
        outcomes = link(views, seed)
    if not all(outcome.pairs for outcome in outcomes.values()):
        raise ConfigError(
            f"{mode}: the coalition sees no cells in two consecutive rounds, so that there is nothing to "
            "link; give it more owners (--owners), or more rounds (--rounds)"
        )
    rows = tuple((name, o.accuracy, o.advantage, o.upper(len(LINKERS))) for name, o in outcomes.items())
    games = len(next(iter(outcomes.values())).candidates)
    return Finding(
        mode,
        rows,
        games,
        traced=traced_share(views),
        formula=compromised(n, len(coalition.relays), hops),
        named=named_share(views),
        timing=timing_auc(views),
        even=_even(members, updates),
    )


def _even(members: Callable[[int, np.ndarray], list[Member]], updates: Sequence[np.ndarray]) -> bool:
    """Return whether the bytes between members are the same for real updates and for zeros, as planned."""
    even = True
    for update in (updates[0], np.zeros_like(updates[0])):
        present = members(0, update)
        seen: dict[str, dict[Any, int]] = {}

        def count(
            state: str, messages: Mapping[Any, bytes | None], seen: dict[str, dict[Any, int]] = seen
        ) -> None:
            seen[state] = {pair: len(text or b"") for pair, text in messages.items()}

        play(present, count)
        expected = traffic(present[0].parameters, present[0].plan)
        even &= all(sizes[pair] == expected[state][pair] for state, sizes in seen.items() for pair in sizes)
    return bool(even)


def render(found: Audit, coalition: Coalition | None) -> str:
    """Return the result of an audit as text."""
    who = (
        "all owners of chunks"
        if coalition is None
        else ", ".join(
            f"{role} {sorted(getattr(coalition, role))}"
            for role in ("owners", "relays", "clients")
            if getattr(coalition, role)
        )
    )
    lines = [
        f"{found.clients} clients on {found.task}; {found.rounds} rounds, {found.values} values of each "
        f"update; the coalition: {who}"
    ]
    for finding in found.findings:
        lines.append(
            f"\n{finding.mode}: {finding.games} pairs of rounds, in which chance pairs 1 of {found.clients} "
            "cells rightly"
        )
        lines += [
            f"  {name:<18} accuracy {accuracy:6.3f}   advantage {advantage:+7.3f}   upper 95 % bound "
            f"{upper:6.3f} (for {len(finding.rows)} linkers)"
            for name, accuracy, advantage, upper in finding.rows
        ]
        lines.append(
            f"  cells traced from their source by the coalition's relays: {finding.traced:.3f} (formula "
            f"{finding.formula:.3f})"
        )
        if finding.named[1]:
            lines.append(
                "  cells given to their members by the masks that the coalition knows: "
                f"{finding.named[0]:.3f} (chance {finding.named[1]:.3f})"
            )
        lines.append(
            f"  order of arrival: area under the curve {finding.timing:.3f} (0.5 is chance; 1: the first to "
            "send is the first to come)"
        )
        lines.append(
            "  bytes between members are those that the public plan gives, for updates and for none: "
            f"{'yes' if finding.even else 'NO'}"
        )
    lines += render_lies(found.lies, found.loss)
    return "\n".join(lines)

"""The part of an audit in which the coalition lies: its attacks on one sum of the trained updates, and what
two sums over different participants tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedspeed import activity
from fedspeed.routing.anonymous.bounds import norm_bound
from fedspeed.routing.audit.adversary import Coalition, compromised
from fedspeed.routing.audit.attacks import AttackResult, attacks_on, play_attacks
from fedspeed.routing.audit.payload import encoded
from fedspeed.routing.config import MODES, RoutingConfig
from fedspeed.session.audit_header import HEADER_ATTACKS, HeaderRehearsal, HeaderResult


@dataclass(frozen=True)
class LossFinding:
    """How much of a lost participant's update the difference of two consecutive rounds' sums tells: over all,
    and over all but that one.

    Attributes:
        correlation: of that difference with the lost update, the mean over rounds and lost participants.
        highest: the highest one. of_sum: the mean correlation of the first round's sum with the lost update.
        safe_minimum: a value of routing.min_participants that ends the run before one honest client is left
            with the coalition; 0 if the run ends before that anyway.
    """

    correlation: float
    highest: float
    of_sum: float
    safe_minimum: int


@dataclass(frozen=True)
class LiesFinding:
    """What a coalition that lies gets in one routing mode.

    Attributes:
        mode: as in routing.mode.
        liars: numbers of the clients that lie. clients: how many there are.
        attacks: on a sum of updates. headers: on the numbers before it.
        compromised: probability that all relays of a chunk collude; 0 without relays.
        ground: the most that it becomes for a chunk for which the coalition spoils attempts.
    """

    mode: str
    liars: tuple[int, ...]
    clients: int
    attacks: tuple[AttackResult, ...]
    headers: tuple[HeaderResult, ...]
    compromised: float
    ground: float


def liars_of(coalition: Coalition | None, clients: int) -> frozenset[int]:
    """Return the clients that lie: those that collude as relays or clients, or else as owners of chunks.

    If none are named, or all own chunks, all but two lie. Empty where fewer than two would be honest: the
    coalition knows the last one's update from the sum.
    """
    named = frozenset() if coalition is None else coalition.relays | coalition.clients
    if coalition is not None and not named and len(coalition.owners) <= clients - 2:
        named = coalition.owners
    liars = named or frozenset(range(clients - 2))
    return liars if len(liars) <= clients - 2 else frozenset()


def play_lies(
    mode: str, updates: np.ndarray, weights: Sequence[float], routing: RoutingConfig, liars: frozenset[int]
) -> LiesFinding:
    """Play all attacks of a coalition that lies on one sum.

    Args:
        updates: of one round, [clients, values] float32. weights: by client.
        routing: of the run. liars: numbers of the clients that lie.
    """
    n = len(updates)
    # A run of fewer than min_participants clients would not start.
    config = replace(routing, mode=mode, min_participants=min(routing.min_participants, n))
    span = sum(norm_bound(row) for row in updates)
    integers = [encoded(row, span) for row in updates]
    attacks = attacks_on(config, n - len(liars))
    found: list[AttackResult] = []
    headers: list[HeaderResult] = []
    with activity.during(f"the lies in {mode}", len(attacks) + len(HEADER_ATTACKS), "attack"):
        for result in play_attacks(config, list(updates), integers, liars, attacks):
            found.append(result)
            activity.advance()
        for header in HeaderRehearsal(config, list(updates), weights, liars).play_all():
            headers.append(header)
            activity.advance()
    p = compromised(n, len(liars), min(config.relays, n - 1)) if MODES[mode].mixed else 0.0
    return LiesFinding(
        mode,
        tuple(sorted(liars)),
        n,
        tuple(found),
        tuple(headers),
        compromised=p,
        ground=1 - (1 - p) ** config.attempts,
    )


def measure_loss(
    updates: Sequence[np.ndarray], liars: frozenset[int], routing: RoutingConfig
) -> LossFinding | None:
    """Return what two consecutive rounds tell if an honest client is lost between them; None if there is one
    round only.

    Args:
        updates: by exchange, [clients, values] float32. liars: clients that collude. routing: of the run.
    """
    needed = max(len(updates[0]) // 2 + 1, routing.min_participants)
    honest = [i for i in range(len(updates[0])) if i not in liars]
    found = []
    of_sum = []
    for before, after in zip(updates, updates[1:]):
        total = before[honest].sum(axis=0, dtype=np.float64)
        later = after[honest].sum(axis=0, dtype=np.float64)
        for lost in honest:
            found.append(_correlation(total - (later - after[lost]), before[lost]))
            of_sum.append(_correlation(total, before[lost]))
    if not found:
        return None
    return LossFinding(
        float(np.mean(found)),
        float(np.max(found)),
        float(np.mean(of_sum)),
        safe_minimum=len(liars) + 2 if len(liars) + 1 >= needed else 0,
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0


def render_lies(findings: Sequence[LiesFinding], loss: LossFinding | None) -> list[str]:
    """Return the findings about a coalition that lies, as lines of text."""
    lines = [line for finding in findings for line in _render_mode(finding)]
    if not findings:
        lines.append(
            "\nno lies are played: the modes hide nothing, or fewer than two clients are honest, so that the "
            "sum is the last one's update"
        )
    described = {result.attack: result.description for finding in findings for result in finding.attacks}
    described |= {result.attack: result.description for finding in findings for result in finding.headers}
    if described:
        lines.append("\nthe attacks:")
        lines += [f"  {name:<26} {description}" for name, description in described.items()]
    if loss is not None:
        lines.append(
            "\na client that is lost between two rounds: the difference of their sums correlates with its "
            f"update by {loss.correlation:.2f} on average, {loss.highest:.2f} at most (the sum alone by "
            f"{loss.of_sum:.2f}). The exchange hides no difference between rounds; hiding it is what "
            "differential privacy is for"
        )
        if loss.safe_minimum:
            lines.append(
                "if all honest clients but one are lost, the sums of the next rounds are the updates of the "
                f"last one: routing.min_participants={loss.safe_minimum} ends the run before that"
            )
    return lines


def _render_mode(finding: LiesFinding) -> list[str]:
    liars = ", ".join(map(str, finding.liars))
    alone = finding.attacks[0].closest.error
    lines = [
        f"\n{finding.mode}, clients {liars} of {finding.clients} lie together; without a lie they come to "
        f"{alone:.2g} of one honest update (0: they have read it, 1: they know nothing of it)",
        f"  {'attack':<26} {'closest':<9} {'the sum':<34} named by honest clients",
    ]
    limits = []
    for result in finding.attacks:
        mark = ""
        if result.succeeded:
            limits.append(f"{result.attack}: {result.limit or 'THIS MUST NOT HAPPEN; please report it'}")
            mark = f" ({len(limits)})"
        near = f"{result.closest.error:.2g}" if result.closest.share else "nothing"
        lines.append(f"  {result.attack:<26} {near:<9} {result.end + mark:<34} {_named(result)}")
    for header in finding.headers:
        mark = ""
        if header.succeeded:
            limits.append(f"{header.attack}: {header.limit or 'THIS MUST NOT HAPPEN; please report it'}")
            mark = f" ({len(limits)})"
        lines.append(f"  {header.attack:<26} {'-':<9} {header.end + mark:<34} nobody")
    lines += [f"  ({number}) {limit}" for number, limit in enumerate(limits, start=1)]
    if finding.ground:
        lines.append(
            f"  the chance that all relays of a chunk collude: {finding.compromised:.2f}; of one for which "
            f"they spoil attempts at most {finding.ground:.2f} (routing.attempts)"
        )
    return lines


def _named(result: AttackResult) -> str:
    """Return whom honest clients have named, as text."""
    groups = [
        f"{group[0]} alone" if len(group) == 1 else " or ".join(map(str, group)) for group in result.named
    ]
    silent = [i for i in result.silent if (i,) not in result.named]
    if silent:
        groups.append(f"{', '.join(map(str, silent))} silent")
    return "; ".join(groups) or "nobody"

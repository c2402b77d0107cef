"""Checks of a run's method that need no started process. Pure, and without torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedspeed.cluster.topology import Topology
from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.engine.capabilities import Kind, check_capabilities
from fedspeed.engine.spec import EngineSpec
from fedspeed.errors import ConfigError, DataError, ModelError
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.federation.updates.base import hidden_by, make_transforms
from fedspeed.models.base_files import base_shape
from fedspeed.models.checks import local_base
from fedspeed.monitor.metrics.metric import LOSSES, WEIGHTS


def check_method(
    config: RunConfig,
    participants: Mapping[int, int],
    kind: Kind,
    server_kind: Kind | None = None,
    *,
    client: EngineSpec | None = None,
) -> None:
    """Check that a run's method works with the rest of its configuration.

    Args:
        config: whose routing mode is no longer `auto`. participants: by client, see `participants_of`.
        kind: of the engine that clients build. server_kind: of the server's engine; None where the method has
            no server.
        client: see `adapted_modules`; None: with ZeRO-0.

    Raises:
        ConfigError: all problems in one message, each with its remedy.
    """
    name = config.federation.method.name
    method = method_class(name)
    problems = [
        masked_problem(config, method, participants, client),
        step_problem(config, method),
        serving_problem(config, method),
        epoch_problem(config, method),
        losses_problem(config, hidden_by(config.federation.updates)),
        updates_problem(config.federation.updates, method),
    ]
    stage = 0 if client is None else zero_stage(client.deepspeed)
    needs = [(method.needs, kind, f"federation.method={name}")]
    if server_kind is not None:
        needs.append((method.server_needs, server_kind, f"the server of federation.method={name}"))
    for needed, built, asker in needs:
        try:
            check_capabilities(needed, built, asker, zero_stage=stage)
        except ConfigError as error:
            problems.append(str(error))
    problems = [problem for problem in problems if problem]
    if problems:
        raise ConfigError("; ".join(problems))


def participants_of(config: RunConfig, topology: Topology, count: int) -> dict[int, int]:
    """Return, for every client of the run, the number of the participant whose gateway speaks for it.

    Between organisations each site is one participant; a site does not know how many clients another has, so
    that they count as one client each.

    Args:
        count: number of participants (routing.checks.check_routing).
    """
    if config.routing.between_organisations:
        return {site: site for site in range(count)}
    return dict(enumerate(topology.gateways))


def adapted_modules(config: RunConfig, client: EngineSpec | None = None) -> int:
    """Return how many matrices have LoRA factors. It is 0 where that is not known: without LoRA, where the
    base has not been downloaded yet, or where something other than the blocks' matrices is adapted.

    Args:
        client: the engine that clients build; None: as the configuration describes it.
    """
    base = local_base(config)
    adapter = config.adapter if client is None else client.adapter
    if adapter.method != "lora" or base is None:
        return 0
    try:
        shape = base_shape(base, config.model.init == "pretrained")
        blocks = shape.layers if client is None or client.blocks is None else len(client.blocks)
        return blocks * len(shape.adapted(adapter.targets))
    except ModelError:  # models.checks reports it
        return 0


def masked_problem(
    config: RunConfig, method: type[Method], participants: Mapping[int, int], client: EngineSpec | None = None
) -> str:
    """Return why a method cannot run in a masked mode; empty if it can.

    Where only few participants contribute to an element of a sum, the sum reveals their values. What a client
    keeps for itself is in the run's folder, which all ranks of a job can read.
    """
    if not config.routing.sums_only:
        return ""
    chosen = config.federation.method
    mode = config.routing.mode
    required = config.routing.min_participants
    setting = f"federation.method={chosen.name}"
    if method.keeps_memory and not config.routing.between_organisations:
        return (
            f"{setting} keeps clients' own arrays in the run's folder, where all processes of a job can read "
            f"what routing.mode={mode} is to hide; set routing.transport=tls or routing.mode=plain"
        )
    holders = _min_holders(config, participants, client)
    if holders >= required:
        return ""
    return (
        f"{setting}: only {holders} of {len(set(participants.values()))} participants may contribute to an "
        f"element of the sum, which reveals too much about each; routing.mode={mode} requires "
        f"routing.min_participants={required}; add participants, set routing.mode=plain inside one trust "
        "domain, or choose another method"
    )


def least_participants(
    config: RunConfig, participants: Mapping[int, int], client: EngineSpec | None = None
) -> int:
    """Return the smallest number of participants with which a masked sum may be finished after losses.

    Every lost participant may be one of the fewest that contribute to some element, so a method whose
    elements have few contributors can lose fewer participants.

    Args:
        participants: by client, see `participants_of`. client: see `adapted_modules`.
    """
    required = config.routing.min_participants
    holders = _min_holders(config, participants, client)
    return max(required, len(set(participants.values())) - (holders - required))


def _min_holders(config: RunConfig, participants: Mapping[int, int], client: EngineSpec | None) -> int:
    """Return the smallest number of participants that contribute to an element of the run's sums
    (`Method.min_holders`). All clients train in every round, since masked modes refuse sampling.
    """
    chosen = config.federation.method
    return method_class(chosen.name).min_holders(chosen, participants, adapted_modules(config, client))


def check_weight(config: RunConfig, weight: float) -> None:
    """Compare the weight of this rank's clients with the public bound of the masked modes.

    Args:
        config: whose routing mode is no longer `auto`. weight: answer tokens of their training rows.

    Raises:
        DataError: it is above the bound, so that all others would refuse the sum.
    """
    routing = config.routing
    if (
        not routing.sums_only
        or weight <= routing.max_weight
        or WEIGHTS in hidden_by(config.federation.updates)
    ):
        return
    raise DataError(
        f"{config.data.source}: the training rows of this participant's clients have {weight:,.0f} answer "
        f"tokens, and routing.max_weight={routing.max_weight:,.0f} is the most that one participant may "
        "have; raise "
        "routing.max_weight on all sites, or use fewer rows (data.max_rows)"
    )


def updates_problem(updates: Sequence[Any], method: type[Method]) -> str:
    """Return why a method cannot run with transforms of updates; empty if it can.

    Args:
        updates: `federation.updates`.
    """
    try:
        make_transforms(updates)
    except ValueError as error:
        return str(error)
    if updates and method.serve is not Method.serve:
        names = ", ".join(update.name for update in updates)
        return (
            f"federation.updates ({names}) changes what clients send to the sum, but clients of "
            f"{method.__name__} send arrays to a server before, which no transform sees; leave one of them "
            "out"
        )
    return ""


def losses_problem(config: RunConfig, hides: frozenset[str]) -> str:
    """Return which settings need losses that transforms of updates hide; empty if there are none.

    Args:
        hides: what the run's transforms hide.
    """
    if LOSSES not in hides:
        return ""
    settings = {
        "federation.compare_alone=true": config.federation.compare_alone,
        f"federation.patience={config.federation.patience}": config.federation.patience,
    }
    needing = [setting for setting, is_set in settings.items() if is_set]
    if not needing:
        return ""
    names = ", ".join(transform.name for transform in config.federation.updates)
    return (
        f"federation.updates ({names}) hides losses, and {' and '.join(needing)} needs them; leave one of "
        "them out"
    )


def step_problem(config: RunConfig, method: type[Method]) -> str:
    """Return which settings exclude a method that exchanges in every local step; empty if none does, or the
    method exchanges once a round.
    """
    if method.exchange_every != "step":
        return ""
    budget = config.federation.round_budget
    excluding = (
        ("federation.staleness=1", config.federation.staleness, "federation.staleness=0"),
        (f"federation.round_budget={budget}", budget != "steps", "federation.round_budget=steps"),
        (
            "train.local_steps_by_cluster",
            config.train.local_steps_by_cluster,
            "train.local_steps_by_cluster={}",
        ),
        ("federation.compare_alone=true", config.federation.compare_alone, "federation.compare_alone=false"),
    )
    present = {setting: remedy for setting, is_set, remedy in excluding if is_set}
    if not present:
        return ""
    return (
        f"federation.method={config.federation.method.name} exchanges updates in every local step, which all "
        f"clients take together; it cannot be combined with {' or '.join(present)}; set "
        f"{' and '.join(present.values())}, or choose another method"
    )


def serving_problem(config: RunConfig, method: type[Method]) -> str:
    """Return why a method whose server answers clients while they train cannot run; empty if it can.

    Its server belongs to no cluster of clients, and knows one number of local steps for all of them.
    """
    steps = config.train.local_steps_by_cluster
    if method.serve is Method.serve or not steps:
        return ""
    return (
        f"train.local_steps_by_cluster={flow(steps)}: the server of federation.method="
        f"{config.federation.method.name} trains with clients step by step, and they must all take "
        "train.local_steps of them; leave train.local_steps_by_cluster out, or choose another method"
    )


def epoch_problem(config: RunConfig, method: type[Method]) -> str:
    """Return why a method cannot run with rounds of one epoch; empty if it can.

    Clients that are trained at the same time then have different numbers of steps, for which `Method.train`
    is made; one of the method's own may not be.
    """
    takes_unequal = method.train is Method.train or method.unequal_turns
    if config.federation.round_budget != "epoch" or takes_unequal:
        return ""
    return (
        f"federation.round_budget=epoch: clients take different numbers of local steps, but "
        f"federation.method={config.federation.method.name} trains them in a way of its own; set "
        "federation.round_budget=steps, or choose another method"
    )

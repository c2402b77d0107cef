"""What can be checked of a federation's method before anything is started. Pure, and without torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedspeed.cluster.topology import Topology
from fedspeed.config.run import RunConfig
from fedspeed.engine.capabilities import Kind, check_capabilities
from fedspeed.engine.spec import EngineSpec
from fedspeed.errors import ConfigError, ModelError
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.federation.updates.base import hidden_by, make_updates
from fedspeed.models.base_files import base_shape
from fedspeed.models.checks import local_base
from fedspeed.monitor.metrics.metric import LOSSES


def check_method(
    config: RunConfig,
    participants: Mapping[int, int],
    kind: Kind,
    server_kind: Kind | None = None,
    *,
    client: EngineSpec | None = None,
) -> None:
    """Check that a run can use its method.

    Args:
        config: with its routing mode settled. participants: of a sum, see `participants_of`. kind: of the
            engine that is to be built. server_kind: of the server's engine, None where the method has no
            server. client: see `adapted_modules`.

    Raises:
        ConfigError: all that stands against it, with the remedy.
    """
    name = config.federation.method.name
    method = method_class(name)
    problems = [
        masked_problem(config, method, participants, client),
        step_problem(config, method),
        losses_problem(config, hidden_by(config.federation.updates)),
        updates_problem(config.federation.updates, method),
    ]
    needs = [(method.needs, kind, f"federation.method={name}")]
    if server_kind is not None:
        needs.append((method.server_needs, server_kind, f"the server of federation.method={name}"))
    for needed, built, asker in needs:
        try:
            check_capabilities(needed, built, asker)
        except ConfigError as error:
            problems.append(str(error))
    if found := [problem for problem in problems if problem]:
        raise ConfigError("; ".join(found))


def participants_of(config: RunConfig, topology: Topology, count: int) -> dict[int, int]:
    """Return by client of the whole run the participant that speaks for it in a sum: its gateway. A site of
    several organisations is one participant, and knows of the others' clients no more than that.

    Args:
        count: participants (routing.checks.check_routing).
    """
    if config.routing.between_organisations:
        return {site: site for site in range(count)}
    return dict(enumerate(topology.gateways))


def adapted_modules(config: RunConfig, client: EngineSpec | None = None) -> int:
    """Return how many matrices LoRA stands beside, 0 where that is not known: other weights train, the base
    is not here yet, or something else than the blocks' matrices is adapted.

    Args:
        client: the engine that clients build; None: what the configuration asks for.
    """
    base = local_base(config)
    adapter = config.adapter if client is None else client.adapter
    if adapter.method != "lora" or base is None:
        return 0
    try:
        shape = base_shape(base, config.model.init == "pretrained")
        blocks = shape.layers if client is None or client.blocks is None else len(client.blocks)
        return blocks * len(shape.adapted(adapter.targets))
    except ModelError:  # told by models.checks where it is a fault
        return 0


def masked_problem(
    config: RunConfig, method: type[Method], participants: Mapping[int, int], client: EngineSpec | None = None
) -> str:
    """Return what stands against a method in a masked mode, empty if nothing does.

    A sum tells an element that few clients hold as those clients' own value. What a client keeps for itself
    lies in the run's folder, which in one job is common to all.
    """
    if not config.routing.sums_only:
        return ""
    chosen = config.federation.method
    mode = config.routing.mode
    least = config.routing.min_participants
    named = f"federation.method={chosen.name}"
    if method.keeps_memory and not config.routing.between_organisations:
        return (
            f"{named} keeps what is a client's own in the run's folder, where all of one job can read what "
            f"routing.mode={mode} is to hide; set routing.transport=tls or routing.mode=plain"
        )
    holders = _fewest_holders(config, participants, client)
    if holders >= least:
        return ""
    return (
        f"{named}: of {len(set(participants.values()))} participants only {holders} may meet in an element "
        "of "
        f"the sum, which says too much about each; routing.mode={mode} asks for "
        f"routing.min_participants={least}; take more "
        "participants, set routing.mode=plain inside one trust domain, or choose another method"
    )


def least_participants(
    config: RunConfig, participants: Mapping[int, int], client: EngineSpec | None = None
) -> int:
    """Return the fewest participants that a masked sum may be left with. Each that is lost may be one of the
    fewest that meet in an element, so a method with slices of few can lose fewer.

    Args:
        participants: of the whole sum, see `participants_of`. client: see `adapted_modules`.
    """
    least = config.routing.min_participants
    holders = _fewest_holders(config, participants, client)
    return max(least, len(set(participants.values())) - (holders - least))


def _fewest_holders(config: RunConfig, participants: Mapping[int, int], client: EngineSpec | None) -> int:
    """Return the fewest participants that meet in an element of the run's sums (`Method.min_holders`). All
    clients train in every round: drawing some of them is refused in masked modes.
    """
    chosen = config.federation.method
    return method_class(chosen.name).min_holders(chosen, participants, adapted_modules(config, client))


def updates_problem(updates: Sequence[Any], method: type[Method]) -> str:
    """Return what stands against a run's transforms of updates, empty if nothing does.

    Args:
        updates: `federation.updates`.
    """
    try:
        make_updates(updates)
    except ValueError as error:
        return str(error)
    if updates and method.serve is not Method.serve:
        names = ", ".join(update.name for update in updates)
        return (
            f"federation.updates ({names}) is about what clients send to the sum, but a server answers them "
            f"before: {method.__name__} tells it what no transform has seen; leave one of them out"
        )
    return ""


def losses_problem(config: RunConfig, hides: frozenset[str]) -> str:
    """Return what stands against transforms of updates that hide losses, empty if nothing does.

    Args:
        hides: what the run's transforms hide together.
    """
    if LOSSES not in hides:
        return ""
    asking = {
        "federation.compare_alone=true": config.federation.compare_alone,
        f"federation.patience={config.federation.patience}": config.federation.patience,
    }
    found = [setting for setting, is_set in asking.items() if is_set]
    if not found:
        return ""
    names = ", ".join(transform.name for transform in config.federation.updates)
    return (
        f"federation.updates ({names}) hides losses, and {' and '.join(found)} needs them; leave one of them "
        "out"
    )


def step_problem(config: RunConfig, method: type[Method]) -> str:
    """Return what stands against an exchange in every local step, empty if nothing does or there is none."""
    if method.exchange_every != "step":
        return ""
    against = {
        "federation.staleness=1": config.federation.staleness,
        "federation.round_budget=seconds": config.federation.round_budget == "seconds",
        "train.local_steps_by_cluster": config.train.local_steps_by_cluster,
        "federation.compare_alone=true": config.federation.compare_alone,
    }
    found = [setting for setting, is_set in against.items() if is_set]
    if not found:
        return ""
    return (
        f"federation.method={config.federation.method.name} exchanges updates in every local step, which all "
        f"clients take together; it goes with no {' and no '.join(found)}"
    )

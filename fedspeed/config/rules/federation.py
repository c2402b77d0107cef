"""Rules about rounds, methods, servers, and what the routing is to hide."""

import operator
from collections.abc import Iterator

from fedspeed.config.rules.conflict import Conflict, chosen_method
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.federation.methods.config import METHODS


def check_sites(config: RunConfig) -> Iterator[Conflict]:
    if not config.routing.between_organisations:
        return
    transport = config.routing.transport
    if config.model.dtype == "auto":
        yield Conflict(
            ("model.dtype", "routing.transport"),
            f"model.dtype=auto is decided among the ranks of one job, but routing.transport={transport} "
            "has a job on each site, and all must compute in one type; name it on every site: "
            "model.dtype=bf16 where all have GPUs with bf16, fp16 where one is older, fp32 where "
            "one trains on CPUs",
        )
    if config.federation.clients_per_round:
        yield Conflict(
            ("federation.clients_per_round", "routing.transport"),
            "federation.clients_per_round draws among the clients of one job, but "
            f"routing.transport={transport} has a job on each site; leave it out",
        )


def check_staleness(config: RunConfig) -> Iterator[Conflict]:
    if not config.federation.staleness:
        return
    remedy = "with federation.staleness=1; set federation.staleness=0, or choose another"
    if not METHODS[config.federation.method.name].adds_deltas:
        yield Conflict(
            ("federation.staleness", "federation.method"),
            f"{chosen_method(config)} does not declare that late updates may be added to its state, as "
            f"needed {remedy}",
        )
    if config.federation.local_optimizer == "keep":
        yield Conflict(
            ("federation.staleness", "federation.local_optimizer"),
            f"federation.local_optimizer=keep would be a round ahead of the state it belongs to {remedy}",
        )


def check_budget(config: RunConfig) -> Iterator[Conflict]:
    federation = config.federation
    if (federation.round_budget == "seconds") != (federation.round_seconds > 0):
        yield Conflict(
            ("federation.round_budget", "federation.round_seconds"),
            f"federation.round_budget={federation.round_budget} with federation.round_seconds="
            f"{federation.round_seconds:g}; a budget of seconds needs both, "
            "federation.round_budget=seconds and federation.round_seconds above 0",
        )
    if federation.round_budget != "seconds":
        return
    if not METHODS[federation.method.name].adds_deltas:
        yield Conflict(
            ("federation.round_budget", "federation.method"),
            f"{chosen_method(config)} does not declare that it averages deltas, but with "
            "federation.round_budget=seconds clients have trained for different numbers of steps; "
            "choose another method, or a budget of steps",
        )
    if config.train.local_steps_by_cluster:
        yield Conflict(
            ("federation.round_budget", "train.local_steps_by_cluster"),
            "train.local_steps_by_cluster gives clusters a number of steps, and "
            "federation.round_budget=seconds as many as fit; leave one of them out",
        )


def check_epochs(config: RunConfig) -> Iterator[Conflict]:
    """Refuse what needs equal numbers of steps, or numbers that are known before the rows are read."""
    if config.federation.round_budget != "epoch":
        return
    reasons = {
        "train.local_steps_by_cluster": (
            config.train.local_steps_by_cluster,
            "gives clusters a number of steps, not their clients' rows",
        ),
        "train.warmup_steps": (
            config.train.warmup_steps,
            "counts steps, of which clients take different numbers in a round",
        ),
        "engine.pipeline": (
            config.engine.pipeline == "cluster",
            "computes the steps of all clients of a cluster together, so that all take equally many",
        ),
    }
    for key, (is_set, why) in reasons.items():
        if is_set:
            value = flow(operator.attrgetter(key)(config))
            yield Conflict(
                (key, "federation.round_budget"),
                f"{key}={value} {why}, as federation.round_budget=epoch says; leave one of them out",
            )


def check_privacy(config: RunConfig) -> Iterator[Conflict]:
    """Refuse settings that reveal single clients where the routing is to hide them."""
    if not config.routing.sums_only:
        return
    federation = config.federation
    reasons: dict[str, str] = {}
    if not METHODS[federation.method.name].sums_only:
        reasons["method"] = f"{chosen_method(config)} needs every client's own values"
    if drawn := federation.clients_per_round:
        reasons["clients_per_round"] = (
            f"federation.clients_per_round={drawn} sums the updates of few and changing clients"
        )
    if federation.compare_alone:
        reasons["compare_alone"] = "federation.compare_alone=true shows the value of each client's rows"
    if federation.local_optimizer == "keep":
        reasons["local_optimizer"] = (
            "federation.local_optimizer=keep keeps each client's optimizer state in the run's folder"
        )
    for key, why in reasons.items():
        yield Conflict(
            (f"federation.{key}", "routing.mode"),
            f"{why}, which routing.mode={config.routing.mode} with "
            f"routing.transport={config.routing.transport} is to hide; set "
            "routing.mode=plain inside one trust domain, or leave it out",
        )


def check_method(config: RunConfig) -> Iterator[Conflict]:
    federation = config.federation
    entry = METHODS[federation.method.name]
    step = 1.0 if federation.server_lr == "auto" else federation.server_lr
    required: list[tuple[str, object, object]] = []
    if not entry.server_optimizers:
        required += [("server_optimizer", federation.server_optimizer, "none"), ("server_lr", step, 1.0)]
    if not entry.adds_deltas:
        required.append(("local_optimizer", federation.local_optimizer, "reset"))
    for key, value, wanted in required:
        if value != wanted:
            yield Conflict(
                ("federation.method", f"federation.{key}"),
                f"{chosen_method(config)} does not declare that its new state is the old one plus a delta of "
                f"each array, so that federation.{key}={value} might combine arrays that do not correspond; "
                f"set it to {wanted}, or choose another method",
            )
    if federation.updates and not entry.adds_deltas:
        names = ", ".join(update.name for update in federation.updates)
        yield Conflict(
            ("federation.updates", "federation.method"),
            f"federation.updates ({names}) transform deltas that are averaged, but {chosen_method(config)} "
            "does not declare that it averages any; leave federation.updates out, or choose another method",
        )
    folds = entry.folds or config.adapter.rank_by_client  # smaller clients fold what they do not train
    if folds and config.engine.compile_blocks:
        yield Conflict(
            ("engine.compile_blocks", "federation.method"),
            "engine.compile_blocks=true computes all blocks by the code of one, but "
            f"{chosen_method(config)} adds different weights to each block; set engine.compile_blocks=false, "
            "or choose another method",
        )
    for chosen in (federation.method, *federation.updates):  # a method or transform may have rules of its own
        if find_problems := getattr(chosen, "problems", None):
            for keys, text in find_problems(config):
                yield Conflict(keys, text)


def check_server(config: RunConfig) -> Iterator[Conflict]:
    federation = config.federation
    entry = METHODS[config.federation.method.name]
    if federation.public_rows and not entry.public_rows:
        yield Conflict(
            ("federation.public_rows", "federation.method"),
            f"federation.public_rows={federation.public_rows} would not be read, because "
            f"{chosen_method(config)} has no server that trains on rows; leave it out, or choose another "
            "method",
        )
    if entry.public_rows and not federation.public_rows:
        yield Conflict(
            ("federation.public_rows", "federation.method"),
            f"the server of {chosen_method(config)} trains on public rows, and federation.public_rows is "
            "empty; name a file of rows on the server's host",
        )
    if not entry.server:
        return
    unsupported = (
        (
            "engine.pipeline",
            config.engine.pipeline != "none",
            "none",
            "divides the model over ranks of clients",
        ),
        (
            "federation.staleness",
            federation.staleness == 1,
            "0",
            "trains during the exchange, when no client may send to the server",
        ),
        ("federation.compare_alone", federation.compare_alone, "false", "trains each client alone"),
        (
            "federation.round_budget",
            federation.round_budget == "epoch",
            "steps",
            "lets clients take different numbers of steps",
        ),
        (
            "routing.transport",
            config.routing.between_organisations,
            "auto",
            "has a job on each site, but a server needs one job",
        ),
    )
    for key, is_set, wanted, why in unsupported:
        if is_set:
            value = flow(operator.attrgetter(key)(config))
            yield Conflict(
                (key, "federation.method"),
                f"{key}={value} {why}, and {chosen_method(config)} has a server; set {key}={wanted}, "
                "or choose another method",
            )

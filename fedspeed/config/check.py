"""Checks between the values of a configuration. Pure: no file, device or hostfile is read."""

from fedspeed.config.deepspeed_rules import clashes
from fedspeed.config.rules import client_ranks, engine, federation, model
from fedspeed.config.rules.conflict import Conflict
from fedspeed.config.run import RunConfig

RULES = (
    model.check_names,
    model.check_adapter,
    client_ranks.check_client_ranks,
    engine.check_engine,
    engine.check_pipeline,
    federation.check_sites,
    federation.check_staleness,
    federation.check_budget,
    federation.check_epochs,
    federation.check_privacy,
    federation.check_method,
    federation.check_server,
    model.check_training,
    model.check_clients,
    model.check_template,
)


def problems(config: RunConfig) -> list[str]:
    """Return a message for each rule that `config` breaks, with keys, values and remedy."""
    return [conflict.text for conflict in conflicts(config)]


def conflicts(config: RunConfig) -> list[Conflict]:
    """Return the conflicts between values of a configuration, with the keys that take part in each."""
    found = [conflict for rule in RULES for conflict in rule(config)]
    section = {key: value for key, value in config.deepspeed.items() if key != "base"}
    for clash in clashes(section, config):
        found.append(Conflict((f"deepspeed.{clash.key}", *clash.run_keys), f"deepspeed.{clash.text}"))
    return found


def notes(config: RunConfig) -> list[str]:
    """Return remarks about values that are valid but probably not what was meant."""
    train = config.train
    rounds = config.federation.rounds
    steps = max([train.local_steps, *train.local_steps_by_cluster.values()])
    if not train.lr:
        return [
            "train.lr=0: no weight changes, so that nothing is learned; give a rate above 0, unless that "
            "is meant"
        ]
    if train.warmup_steps <= rounds * steps:
        return []
    return [
        f"train.warmup_steps={train.warmup_steps}, but the run has only {rounds} x {steps} local steps, "
        f"so that train.lr={train.lr:g} is never reached; lower train.warmup_steps"
    ]

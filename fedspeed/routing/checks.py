"""Check the configuration of the exchange before anything is started."""

import sys
from dataclasses import replace
from importlib.util import find_spec

from fedspeed.cluster.topology import Topology
from fedspeed.config.check import problems
from fedspeed.config.run import RunConfig
from fedspeed.errors import ConfigError
from fedspeed.federation.methods.config import secure_sum_of
from fedspeed.routing.config import RoutingConfig


def check_routing(config: RunConfig, topology: Topology) -> tuple[RoutingConfig, int]:
    """Return (the routing with mode `auto` resolved, how many participants a sum has). A server adds nothing
    to a sum and does not count.

    Raises:
        ConfigError: too few participants, a configuration that the mode forbids, or a package that it lacks.
        FedSpeedError: a file of the site is invalid.
    """
    routing = config.routing
    count = len(topology.contributors)
    if routing.between_organisations:
        if count != 1:
            raise ConfigError(
                f"routing.transport={routing.transport}: a site is one participant, but its "
                f"{len(topology.ranks)} ranks carry clients of {count}; set data.clients=1, or "
                "cluster.local_ranks=1"
            )
        from fedspeed.routing.identity import membership  # needs cryptography, which a plain run does without

        count = len(membership(routing)[1].members)
    routing = routing.resolved(count)
    if broken := problems(replace(config, routing=routing)):
        raise ConfigError("; ".join(broken))
    if routing.anonymous and find_spec("cryptography") is None:
        raise ConfigError(
            f"routing.mode={routing.mode} needs the package cryptography, which is not "
            f"installed for {sys.executable}: pip install cryptography, or set routing.mode=plain inside one "
            "trust domain"
        )
    secure_sum = secure_sum_of(config.federation.method)
    if secure_sum != "none" and find_spec("cryptography") is None:
        raise ConfigError(
            f"federation.method.secure_sum={secure_sum} needs the package cryptography, which is not "
            f"installed for {sys.executable}: pip install cryptography, or set "
            "federation.method.secure_sum=none"
        )
    if config.has_server and find_spec("cryptography") is None:
        raise ConfigError(
            f"federation.method={config.federation.method.name} has a server, whose results are signed by "
            f"the package cryptography, which is not installed for {sys.executable}: pip install cryptography"
        )
    if routing.anonymous and count < routing.min_participants:
        raise ConfigError(
            f"routing.mode={routing.mode} with {count} participant{'s' if count > 1 else ''}: "
            f"a sum of fewer than {routing.min_participants} says too much about each; set "
            "routing.mode=plain inside one trust domain, or more ranks (cluster.local_ranks, or the hostfile)"
        )
    return routing, count


def routing_notes(asked: RoutingConfig, participants: int) -> list[str]:
    """Return notes for the user where `routing.mode=auto` means a mode that hides nothing."""
    if asked.mode != "auto" or asked.resolved(participants).anonymous or participants < 2:
        return []
    return [
        f"routing.mode=plain for {participants} participants: a masked sum of fewer than "
        f"{asked.min_participants} would say too much about each, so that updates travel in the clear "
        "inside this job"
    ]

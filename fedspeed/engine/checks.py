"""What can be checked of the engine, before anything is started and without torch."""

from collections.abc import Mapping
from importlib.util import find_spec

from fedspeed.cluster.hostfile import Hostfile
from fedspeed.cluster.topology import Topology
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import Loaded
from fedspeed.config.run import RunConfig
from fedspeed.engine.base.choose import choose_tier, layout_of, pipeline_tier
from fedspeed.engine.base.describe import unread
from fedspeed.engine.operators import check_operators
from fedspeed.errors import ConfigError, FedSpeedError
from fedspeed.models.planned import planned_shape
from fedspeed.models.saved_adapter import outside_blocks
from fedspeed.routing.config import RoutingConfig
from fedspeed.schedule.limits import QUANTISED


def engine_notes(loaded: Loaded) -> list[str]:
    """Which settings of the engine change nothing."""
    config = loaded.config
    return unread(config, merge(config.deepspeed, config, loaded.folder), outside_blocks(config.adapter))


def check_engine(loaded: Loaded) -> None:
    """Check that the packages and operators are there which the engine needs, as far as the configuration
    alone tells.

    Raises:
        FedSpeedError: one is not.
    """
    engine = loaded.config.engine
    if engine.tier in QUANTISED and find_spec("bitsandbytes") is None:
        raise FedSpeedError(
            f"engine.tier={engine.tier} needs bitsandbytes: pip install -r requirements-quantised.txt, or "
            "choose another "
            "tier"
        )
    if (
        engine.pipeline == "none"
    ):  # what trains outside the blocks, and so in stock execution, is known with the model only
        ds_config = merge(loaded.config.deepspeed, loaded.config, loaded.folder)
        check_operators(choose_tier(engine, ds_config, loaded.config.adapter.method != "full"), ds_config)


def check_pipeline(
    config: RunConfig,
    ds_config: Mapping,
    routing: RoutingConfig,
    topology: Topology,
    hostfile: Hostfile | None,
) -> None:
    """A pipeline needs several ranks, no more than blocks, and cuts that fit; one over a cluster clients who
    trust each other, or none who hide anything.

    Args:
        routing: with its mode settled.
    """
    scope = config.engine.pipeline
    if scope == "client" and (short := [c.client for c in topology.clients if len(c.ranks) < 2]):
        raise ConfigError(
            f"engine.pipeline=client: client {short[0]} has one rank, and a pipeline needs two; set "
            "cluster.ranks_per_client=2 or more, with as "
            "many ranks for each client (cluster.local_ranks, or the hostfile)"
        )
    if scope == "cluster" and (short := [c.name for c in topology.clusters if len(c.ranks) < 2]):
        raise ConfigError(
            f"engine.pipeline=cluster: cluster {short[0]} has one rank, and a pipeline needs two; give it "
            "more, or set engine.pipeline=none"
        )
    if scope != "none" and (tier := pipeline_tier(config.engine, ds_config, "")):
        for ranks in {
            len(place.ranks) for place in (topology.clients if scope == "client" else topology.clusters)
        }:
            layout_of(config.engine, tier, planned_shape(config.model.base).layers, ranks)
    if scope == "cluster" and routing.anonymous and not config.cluster.one_trust_domain:
        if apart := [
            c.name
            for c in topology.clusters
            if hostfile is None or hostfile.cluster(c.name).trust != "shared"
        ]:
            raise ConfigError(
                "engine.pipeline=cluster shows every client's activations and adapter to the cluster's "
                "ranks, which "
                f"routing.mode={routing.mode} is there to hide; if the clients of cluster {apart[0]} trust "
                "each other, set "
                f"cluster.one_trust_domain=true (or `# fed-cluster {apart[0]} trust=shared` in the "
                "hostfile), else engine.pipeline=client"
            )

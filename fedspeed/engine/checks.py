"""Checks of the engine's configuration before anything starts, without torch."""

from collections.abc import Mapping
from importlib.util import find_spec

from fedspeed.cluster.hostfile import Hostfile
from fedspeed.cluster.topology import Topology
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import Loaded
from fedspeed.config.run import RunConfig
from fedspeed.engine.base.describe import unused_settings
from fedspeed.engine.base.placement import choose_tier, layout_of, pipeline_tier
from fedspeed.engine.operators import check_operators
from fedspeed.errors import ConfigError, FedSpeedError
from fedspeed.models.planned_shape import planned_shape
from fedspeed.models.saved_adapter import outside_blocks
from fedspeed.routing.config import RoutingConfig
from fedspeed.schedule.limits import QUANTISED


def engine_notes(loaded: Loaded) -> list[str]:
    """Return a line for each engine setting that has no effect in this run."""
    config = loaded.config
    return unused_settings(
        config, merge(config.deepspeed, config, loaded.folder), outside_blocks(config.adapter)
    )


def check_engine(loaded: Loaded) -> None:
    """Check that the packages and operators that the engine needs are installed, as far as the configuration
    alone decides which ones it needs.

    Raises:
        FedSpeedError: one is missing.
    """
    engine = loaded.config.engine
    if engine.tier in QUANTISED and find_spec("bitsandbytes") is None:
        raise FedSpeedError(
            f"engine.tier={engine.tier} needs bitsandbytes: pip install -r requirements-quantised.txt, or "
            "choose another tier"
        )
    # Whether a parameter outside the blocks trains, which needs stock execution, is known with the model
    # only.
    if engine.pipeline == "none":
        ds_config = merge(loaded.config.deepspeed, loaded.config, loaded.folder)
        check_operators(choose_tier(engine, ds_config, loaded.config.adapter.method != "full"), ds_config)


def check_pipeline(
    config: RunConfig,
    ds_config: Mapping,
    routing: RoutingConfig,
    topology: Topology,
    hostfile: Hostfile | None,
) -> None:
    """Check what `engine.pipeline` requires: at least two ranks, no more ranks than blocks, and cuts that
    fit. A pipeline over a cluster also requires clients that trust each other, or a routing that hides
    nothing.

    Args:
        routing: its mode is not auto any more.

    Raises:
        ConfigError: there are too few ranks, or the clients of a cluster are in different trust domains.
        FedSpeedError: there are more ranks than blocks, or engine.cuts do not fit.
    """
    scope = config.engine.pipeline
    if scope == "client" and (clients := [c.client for c in topology.clients if len(c.ranks) < 2]):
        raise ConfigError(
            f"engine.pipeline=client: client {clients[0]} has one rank, and a pipeline needs two; set "
            "cluster.ranks_per_client=2 or more, with as many ranks for each client (cluster.local_ranks, or "
            "the hostfile)"
        )
    if scope == "cluster" and (clusters := [c.name for c in topology.clusters if len(c.ranks) < 2]):
        raise ConfigError(
            f"engine.pipeline=cluster: cluster {clusters[0]} has one rank, and a pipeline needs two; give it "
            "more, or set engine.pipeline=none"
        )
    if scope != "none":
        tier = pipeline_tier(config.engine, ds_config, "")
        pipelines = topology.clients if scope == "client" else topology.clusters
        for ranks in {len(pipeline.ranks) for pipeline in pipelines}:
            layout_of(config.engine, tier, planned_shape(config.model.base).layers, ranks)
    if scope == "cluster" and routing.anonymous and not config.cluster.one_trust_domain:
        names = [c.name for c in topology.clusters]
        apart = [name for name in names if hostfile is None or hostfile.cluster(name).trust != "shared"]
        if apart:
            raise ConfigError(
                "engine.pipeline=cluster shows every client's activations and adapter to the cluster's "
                f"ranks, which routing.mode={routing.mode} is there to hide; if the clients of cluster "
                f"{apart[0]} trust each other, set cluster.one_trust_domain=true (or `# fed-cluster "
                f"{apart[0]} trust=shared` in the hostfile), else engine.pipeline=client"
            )

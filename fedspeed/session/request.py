"""The request for a run, and the job of one rank in it: values that all parts of a session read."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TextIO

from fedspeed.cluster.discover import Launch, mpi_is_fault_tolerant
from fedspeed.cluster.topology import RankPlacement, Topology
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import Loaded, with_values
from fedspeed.config.run import RunConfig
from fedspeed.config.show import as_dict, fingerprint
from fedspeed.log import LOG
from fedspeed.models.numeric_types import NumericType
from fedspeed.routing.config import TRANSPORTS
from fedspeed.routing.opening import resolve
from fedspeed.session.deployment import Deployment, deployment_of

# Set by a supervisor that has moved an earlier run aside itself (`--fresh`). Ranks that it starts again go on
# from the new run's journal.
FRESH_VARIABLE = "FEDSPEED_FRESH"


@dataclass(frozen=True)
class RunRequest:
    """Describe the run that the command line asks for.

    Args:
        loaded: the configuration.
        hostfile: None to find the launcher's.
        json_out: stream for JSON objects; None without `--json`.
        fresh: whether to start anew, and to move an earlier run of the same name aside.
    """

    loaded: Loaded
    hostfile: Path | None = None
    json_out: TextIO | None = None
    fresh: bool = False

    @property
    def config(self) -> RunConfig:
        """The configuration of the run."""
        return self.loaded.config

    @property
    def is_first_fresh_start(self) -> bool:
        """Whether this is the first start of a run for which `--fresh` was given."""
        is_supervised = os.environ.get(FRESH_VARIABLE) == "1" and os.environ.get("FEDSPEED_RESTARTS") == "0"
        return self.fresh or is_supervised

    @cached_property
    def deepspeed(self) -> dict:
        """The merged DeepSpeed configuration (config.deepspeed.merge)."""
        return merge(self.config.deepspeed, self.config, self.loaded.folder)

    @property
    def fingerprint(self) -> str:
        """The fingerprint that a resumed run must share with its journal, from any working folder."""
        return fingerprint(replace(self.loaded.as_written, deepspeed=self.deepspeed))

    def fingerprint_as(self, earlier: Mapping) -> str:
        """Return the fingerprint that this request would have if every input that is still where an earlier
        start found it were written as it was then.

        Args:
            earlier: the `record` of that start.
        """
        earlier_places = earlier.get("places", {})
        config = self.loaded.as_written
        unmoved = {
            key: _value(earlier, key)
            for key, path in self.loaded.places.items()
            if earlier_places.get(key) == path
        }
        return fingerprint(replace(with_values(config, unmoved), deepspeed=self.deepspeed))

    @property
    def record(self) -> dict:
        """The configuration as the journal stores it: the values as written, and the paths of the inputs."""
        return as_dict(self.loaded.as_written) | {"places": self.loaded.places}

    def with_dtype(self, dtype: NumericType) -> "RunRequest":
        """Return the same request with model.dtype=auto resolved to `dtype`."""
        config = self.config
        sources = self.loaded.sources
        resolved = replace(config, model=replace(config.model, dtype=dtype))
        resolved_sources = sources | {"model.dtype": f"auto ({sources['model.dtype']})"}
        return replace(self, loaded=replace(self.loaded, config=resolved, sources=resolved_sources))

    def with_client_ranks(self, lora_ranks: Sequence[int]) -> "RunRequest":
        """Return the same request with adapter.rank_by_client=auto resolved to `lora_ranks`, by client."""
        config = self.config
        sources = self.loaded.sources
        by_client = {str(client): lora_rank for client, lora_rank in enumerate(lora_ranks)}
        resolved = replace(config, adapter=replace(config.adapter, rank_by_client=by_client))
        resolved_sources = sources | {"adapter.rank_by_client": f"auto ({sources['adapter.rank_by_client']})"}
        return replace(self, loaded=replace(self.loaded, config=resolved, sources=resolved_sources))

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.loaded.run_folder

    def move_aside(self) -> None:
        """Move an earlier run of the same name aside."""
        folder = self.folder
        number = 1
        while (target := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        if folder.exists():
            folder.rename(target)
            LOG.info(f"the earlier run is now {target}")


def _value(values: Mapping, key: str) -> str | tuple[str, ...]:
    section, _, name = key.partition(".")
    return values[section][name]


@dataclass(frozen=True)
class Job:
    """Describe a run as one of its ranks sees it.

    Args:
        request: for the run. launch: how this rank was started. topology: clients on ranks.
    """

    request: RunRequest
    launch: Launch
    topology: Topology

    @cached_property
    def config(self) -> RunConfig:
        """The configuration, with routing.mode=auto resolved for the participants of this job."""
        config = self.request.config
        return replace(config, routing=config.routing.resolved(len(self.topology.contributors)))

    @cached_property
    def deployment(self) -> Deployment:
        """The deployment: one operator's job, or that of an organisation among others."""
        return deployment_of(self.config)

    @property
    def world_rank(self) -> int:
        """The world rank of this process."""
        return self.launch.world_rank

    @property
    def place(self) -> RankPlacement:
        """The placement of this rank in the topology."""
        return self.topology.placement(self.world_rank)

    @property
    def world(self) -> tuple[int, ...]:
        """World ranks of this rank's torch world: its cluster, or its client with engine.pipeline=client."""
        return self.topology.world_of(self.world_rank, self.config.engine.pipeline)

    @property
    def reporter(self) -> bool:
        """Whether this rank commits the journal and writes the report; exactly one rank does."""
        return self.world_rank == self._reporting_rank

    @property
    def _reporting_rank(self) -> int:
        """The first gateway: unlike a server, it has read the rows that the journal stores a digest of."""
        return self.topology.contributors[0]

    @property
    def is_worker(self) -> bool:
        """Whether this rank carries clients, or is a rank of the server."""
        return self.world_rank in self.workers

    @property
    def is_server(self) -> bool:
        """Whether this rank is a rank of the method's server."""
        return self.world_rank in self.topology.server

    @property
    def is_participant(self) -> bool:
        """Whether this rank takes part in the exchange: as a gateway, or for the server."""
        return self.world_rank in self.topology.participants

    @cached_property
    def transport(self) -> str:
        """The name of the transport between the participants."""
        return resolve(self.config.routing.transport, self.launch.kind, len(self.topology.participants))

    @cached_property
    def outlives_losses(self) -> bool:
        """Whether the exchange continues without a participant that is lost.

        It does between organisations, and masked under fault-tolerant MPI (`mpirun --with-ft mpi`). A plain
        sum over the ranks of a job cannot continue, nor can the exchange with a server.
        """
        if self.topology.server:
            return False
        facts = TRANSPORTS[self.transport]
        if facts.outlives_losses:
            return True
        is_tolerant = self.launch.kind in facts.outlives_under and mpi_is_fault_tolerant()
        return is_tolerant and self.config.routing.anonymous

    @cached_property
    def workers(self) -> tuple[int, ...]:
        """World ranks that carry clients, or are ranks of the server."""
        return self.topology.workers

    @cached_property
    def required_ranks(self) -> tuple[int, ...]:
        """World ranks that the run cannot start without: the workers, and rank 0, which holds the store."""
        return tuple(sorted({0, *self.workers}))

    @cached_property
    def vital_ranks(self) -> tuple[int, ...]:
        """World ranks that the run cannot continue without."""
        if TRANSPORTS[self.transport].started_by_mpi and self.outlives_losses:
            return tuple(sorted({0, self._reporting_rank}))
        return self.required_ranks

    def describe(self, rank: int) -> str:
        """Return the name of a world rank in messages: its clients and its host."""
        place = self.topology.placement(rank)
        where = f"rank {rank} on {place.host}"
        if rank in self.topology.server:
            return f"the server ({where})"
        if not place.clients:
            return where
        return f"client{'s' if len(place.clients) > 1 else ''} {', '.join(map(str, place.clients))} ({where})"

"""What a run was asked to be, and where in it this rank stands: values that every part of a session reads and
none changes.
"""

from collections.abc import Mapping
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
from fedspeed.routing.config import TRANSPORTS
from fedspeed.routing.opening import resolve
from fedspeed.session.deployment import Deployment, deployment_of


@dataclass(frozen=True)
class RunRequest:
    """What the command line asked for."""

    loaded: Loaded
    hostfile: Path | None = None
    json_out: TextIO | None = None
    fresh: bool = False

    @property
    def config(self) -> RunConfig:
        """The configuration that was asked for."""
        return self.loaded.config

    @cached_property
    def deepspeed(self) -> dict:
        """DeepSpeed's configuration: the base file, with what ours says in its place."""
        return merge(self.config.deepspeed, self.config, self.loaded.folder)

    @property
    def fingerprint(self) -> str:
        """What a resumed run must have in common with the one in the journal, wherever the command is
        given.
        """
        return fingerprint(replace(self.loaded.as_written, deepspeed=self.deepspeed))

    def fingerprint_as(self, earlier: Mapping) -> str:
        """Return the fingerprint that this request would have if every input that is still where an earlier
        start found it were written as it was then.

        Args:
            earlier: the `record` of that start.
        """
        theirs = earlier.get("places", {})
        config = self.loaded.as_written
        same = {
            key: _value(earlier, key) for key, place in self.loaded.places.items() if theirs.get(key) == place
        }
        return fingerprint(replace(with_values(config, same), deepspeed=self.deepspeed))

    @property
    def record(self) -> dict:
        """What the journal keeps of the configuration: the values as they were written, and where the inputs
        were.
        """
        return as_dict(self.loaded.as_written) | {"places": self.loaded.places}

    def settled(self, dtype: str) -> "RunRequest":
        """Return the same request, with what model.dtype=auto has come to in its place."""
        config = self.config
        sources = self.loaded.sources
        settled = replace(config, model=replace(config.model, dtype=dtype))
        said = sources | {"model.dtype": f"auto ({sources['model.dtype']})"}
        return replace(self, loaded=replace(self.loaded, config=settled, sources=said))

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


def _value(values: Mapping, key: str) -> str:
    section, _, name = key.partition(".")
    return values[section][name]


@dataclass(frozen=True)
class Job:
    """A request, on the ranks that carry it out, as one of them."""

    request: RunRequest
    launch: Launch
    topology: Topology

    @cached_property
    def config(self) -> RunConfig:
        """The configuration, with what routing.mode=auto means for the participants of this job."""
        config = self.request.config
        return replace(config, routing=config.routing.resolved(len(self.topology.contributors)))

    @cached_property
    def deployment(self) -> Deployment:
        """Who the ranks of this job answer to: one operator, or an organisation among others."""
        return deployment_of(self.config)

    @property
    def world_rank(self) -> int:
        """This world rank."""
        return self.launch.world_rank

    @property
    def place(self) -> RankPlacement:
        """Where this rank stands in the topology."""
        return self.topology.placement(self.world_rank)

    @property
    def world(self) -> tuple[int, ...]:
        """World ranks of this rank's torch world: its cluster, or its client where the client's ranks are a
        pipeline, which takes all of a torch world.
        """
        return self.topology.world_of(self.world_rank, self.config.engine.pipeline)

    @property
    def reporter(self) -> bool:
        """Whether this rank commits the journal and reports: exactly one does."""
        return self.world_rank == self._reporting_rank

    @property
    def _reporting_rank(self) -> int:
        """The first gateway: it has read what the journal keeps digests of, which a server has not."""
        return self.topology.contributors[0]

    @property
    def is_worker(self) -> bool:
        """Whether this rank carries clients, or is one of the server's."""
        return self.world_rank in self.workers

    @property
    def is_server(self) -> bool:
        """Whether this rank is one of the server's."""
        return self.world_rank in self.topology.server

    @property
    def is_participant(self) -> bool:
        """Whether this rank speaks for its clients in the exchange."""
        return self.world_rank in self.topology.participants

    @cached_property
    def transport(self) -> str:
        """The name of the transport that the participants take."""
        return resolve(self.config.routing.transport, self.launch.kind, len(self.topology.participants))

    @cached_property
    def outlives_losses(self) -> bool:
        """Whether the exchange goes on among the others when a rank dies.

        Sites of their own do, and MPI where it was asked to (`mpirun --with-ft mpi`). A plain sum over the
        ranks of a job has nothing to go on with, and a server tells its result to everybody or nobody.
        """
        if self.topology.server:
            return False
        facts = TRANSPORTS[self.transport]
        if facts.outlives_losses:
            return True
        spared = self.launch.kind in facts.outlives_under and mpi_is_fault_tolerant()
        return spared and self.config.routing.anonymous

    @cached_property
    def workers(self) -> tuple[int, ...]:
        """World ranks that carry clients, or are the server's."""
        return self.topology.workers

    @cached_property
    def required_ranks(self) -> tuple[int, ...]:
        """World ranks that the run cannot begin without: the workers, and rank 0, which holds the store even
        if it has no client.
        """
        return tuple(sorted({0, *self.workers}))

    @cached_property
    def vital_ranks(self) -> tuple[int, ...]:
        """World ranks that the run cannot go on without."""
        if TRANSPORTS[self.transport].started_by_mpi and self.outlives_losses:
            return tuple(sorted({0, self._reporting_rank}))
        return self.required_ranks

    def describe(self, rank: int) -> str:
        """Return how messages call a world rank: by its clients, and the host it runs on."""
        place = self.topology.placement(rank)
        where = f"rank {rank} on {place.host}"
        if rank in self.topology.server:
            return f"the server ({where})"
        if not place.clients:
            return where
        return f"client{'s' if len(place.clients) > 1 else ''} {', '.join(map(str, place.clients))} ({where})"

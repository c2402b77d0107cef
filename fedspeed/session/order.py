"""What a run was asked to be, and where in it this rank stands: values that every part of a session reads and none changes."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TextIO

from fedspeed.cluster.discover import Launch, mpi_outlives_ranks
from fedspeed.cluster.topology import RankPlace, Topology
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import Loaded, with_values
from fedspeed.config.run import RunConfig
from fedspeed.config.show import as_dict, fingerprint


@dataclass(frozen=True)
class Order:
    """What the command line asked for."""

    loaded: Loaded
    hostfile: Path | None = None
    json_out: TextIO | None = None
    fresh: bool = False

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @cached_property
    def deepspeed(self) -> dict:
        return merge(self.config.deepspeed, self.config, self.loaded.folder)

    @property
    def marks(self) -> str:
        """What a resumed run must have in common with the one in the journal; the same from wherever the command is given."""
        return fingerprint(replace(self.loaded.as_written, deepspeed=self.deepspeed))

    def marks_as(self, earlier: Mapping) -> str:
        """The marks, had the inputs that lie where an earlier start found them been written as they were then.

        Args:
            earlier: the `record` of that start.
        """
        theirs, config = earlier.get("places", {}), self.loaded.as_written
        same = {key: _value(earlier, key) for key, place in self.loaded.places.items() if theirs.get(key) == place}
        return fingerprint(replace(with_values(config, same), deepspeed=self.deepspeed))

    @property
    def record(self) -> dict:
        """What the journal keeps of the configuration: the values as they were written, and where the inputs were."""
        return as_dict(self.loaded.as_written) | {"places": self.loaded.places}

    def settled(self, dtype: str) -> "Order":
        """The same, with what model.dtype=auto has come to in its place."""
        config, sources = self.config, self.loaded.sources
        settled = replace(config, model=replace(config.model, dtype=dtype))
        return replace(self, loaded=replace(self.loaded, config=settled, sources=sources | {"model.dtype": f"auto ({sources['model.dtype']})"}))

    @property
    def folder(self) -> Path:
        return self.loaded.run_folder

    def make_room(self) -> None:
        """Move an earlier run of the same name aside."""
        folder, number = self.folder, 1
        while (target := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        if folder.exists():
            folder.rename(target)
            print(f"fedspeed: the earlier run is now {target}", file=sys.stderr)


def _value(values: Mapping, key: str) -> str:
    section, _, name = key.partition(".")
    return values[section][name]


@dataclass(frozen=True)
class Job:
    """An order, on the ranks that carry it out, as one of them."""

    order: Order
    launch: Launch
    topology: Topology

    @cached_property
    def config(self) -> RunConfig:
        config = self.order.config
        return replace(config, routing=config.routing.settled(len(self.topology.participants)))

    @property
    def me(self) -> int:
        """This world rank."""
        return self.launch.world_rank

    @property
    def place(self) -> RankPlace:
        return self.topology.place(self.me)

    @cached_property
    def site(self):
        """This organisation among others (session.site.Site), under routing.transport=tls; reads its files and its base once."""
        from fedspeed.session.site import Site

        return Site(self.config)

    @property
    def world(self) -> tuple[int, ...]:
        """World ranks of this rank's torch world: its cluster; its client where the client's ranks are a pipeline, which takes all of a torch world."""
        if self.config.engine.pipeline == "client":
            return self.topology.clients[self.place.clients[0]].ranks
        return self.topology.cluster_of(self.place.cluster).ranks

    @property
    def reporter(self) -> bool:
        """Whether this rank commits the journal and reports: exactly one does."""
        return self.me == self.topology.participants[0]

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for its clients in the exchange."""
        return self.me in self.topology.participants

    @cached_property
    def outlives_losses(self) -> bool:
        """Whether the exchange goes on among the others when a rank dies: sites of their own do, and MPI where it was asked to (`mpirun --with-ft mpi`). A
        plain sum has nothing to go on with."""
        routing = self.config.routing
        if routing.transport == "tls":
            return True
        by_mpi = self.launch.kind == "openmpi" and routing.transport in ("auto", "mpi")
        return by_mpi and routing.mode != "plain" and mpi_outlives_ranks()

    @cached_property
    def workers(self) -> tuple[int, ...]:
        """World ranks that carry clients."""
        return tuple(p.world_rank for p in self.topology.ranks if p.clients)

    @cached_property
    def crew(self) -> tuple[int, ...]:
        """World ranks that the run cannot begin without: the workers, and rank 0, which holds the store even if it has no client."""
        return tuple(sorted({0, *self.workers}))

    @cached_property
    def vital(self) -> tuple[int, ...]:
        """World ranks that it cannot go on without."""
        if self.launch.kind == "openmpi" and self.outlives_losses:
            return tuple(sorted({0, self.topology.participants[0]}))
        return self.crew

    def named(self, rank: int) -> str:
        place = self.topology.place(rank)
        where = f"rank {rank} on {place.host}"
        if not place.clients:
            return where
        return f"client{'s' if len(place.clients) > 1 else ''} {', '.join(map(str, place.clients))} ({where})"

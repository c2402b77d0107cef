"""An engine in one process of its own, for commands that only generate or score."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedspeed.config.deepspeed import merge
from fedspeed.config.run import RunConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.engine.spec import EngineContext, EngineSpec
from fedspeed.engine.world import join_world, leave_world, quiet
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.monitor.clock import StageClock

if TYPE_CHECKING:  # it loads torch
    from fedspeed.engine.client_engine import ClientEngine

DEADLINE_S = 600.0


@contextlib.contextmanager
def single_engine(
    model: ModelConfig, adapter: AdapterConfig | None = None, engine: EngineConfig | None = None
) -> Iterator["ClientEngine"]:
    """Give an engine with one client slot in a world of one rank, which ends with the context.

    Args:
        model: its dtype must be resolved. adapter: None: a new one, which does not change the base's outputs.
        engine: None: the base is resident on the device.

    Raises:
        ModelError: the base or the adapter cannot be loaded.
    """
    from fedspeed.engine.build import build_engine

    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )  # any port: nobody else joins
    quiet()
    config = replace(
        RunConfig(),
        model=model,
        adapter=adapter or AdapterConfig(),
        engine=engine or EngineConfig(tier="resident"),
    )
    join_world(DEADLINE_S)
    try:
        with tempfile.TemporaryDirectory() as folder:
            spec = EngineSpec.of(config, merge(config.deepspeed, config, Path.cwd()))
            context = EngineContext(client_sets=[(0,)], clock=StageClock(), nvme=Path(folder), seed=0)
            with contextlib.closing(build_engine(spec, context)) as built:
                yield built
    finally:
        leave_world()

"""Engines of the project, built one after another in the process of a phase, and what their steps take."""

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import card
from benchmarks.gpu.phases import Phase
from benchmarks.gpu.record import Record
from fedspeed.engine.config import EngineConfig


@dataclass(frozen=True)
class Recipe:
    """How an engine is built.

    Attributes:
        stage: of DeepSpeed's ZeRO, for what trains; of the base too where the tier is stock.
        offload: whether stock ZeRO-3 keeps the base in host RAM.
    """

    options: EngineConfig = field(default_factory=EngineConfig)
    dtype: str = "bf16"
    stage: int = 2
    offload: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class Scene:
    """What the functions of a phase are given."""

    phase: Phase
    record: Record
    folder: Path  # for this phase's own files; gone when it ends
    out: Path  # of all results
    dry: bool


@contextmanager
def engine_of(scene: Scene, base: Path, recipe: Recipe):
    """Build an engine over random weights, the same for all recipes of one numeric type, and close it at the
    end.
    """
    from benchmarks.common import ds_config
    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock

    config = ds_config(recipe.stage, recipe.dtype, 10**9)
    config |= {"fp16": {"enabled": recipe.dtype == "fp16", "initial_scale_power": 8}}
    if recipe.offload:
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": not scene.dry}
    card.tidy(scene.dry)
    model = ModelConfig(base=str(base), init="random", dtype=recipe.dtype)
    adapter = AdapterConfig(dropout=recipe.dropout)
    spec = EngineSpec(
        model=model, adapter=adapter, train=TrainConfig(), engine=recipe.options, deepspeed=config
    )
    context = EngineContext(client_sets=[(0,)], clock=StageClock(), nvme=scene.folder / "swap", seed=0)
    engine = build_engine(spec, context)
    try:
        engine.load(engine.state(), seed=5)
        yield engine
    finally:
        engine.close()
        del engine
        card.tidy(scene.dry)


def measured(scene: Scene, base: Path, recipe: Recipe, batches, *, name: str, **how) -> dict:
    """Build an engine, measure a step of it (see `measure` for `how`) and close it.

    A function of its own: whoever still holds an engine holds its memory, and the next one has too little.
    """
    begin = scene.record.seconds
    with engine_of(scene, base, recipe) as engine:
        scene.record.note(f"{name}: built in s", round(scene.record.seconds - begin, 1))
        return measure(scene, engine, batches, **how)


def measure(scene: Scene, engine, batches, repeat: int, warm_up: int = 2, *, each=None) -> dict:
    """Seconds, tokens and memory of a step, and how often and how long the base was loaded for it.

    Args:
        warm_up: steps that are taken before any is counted.
        each: called after each step with the seconds of all so far, in case the phase is killed.
    """
    repeat = 1 if scene.dry else repeat
    seconds = []
    losses = []
    for i in range(warm_up + repeat):
        if i == warm_up:
            card.forget_peaks(scene.dry)
            take_loads(engine)
        card.synchronise(scene.dry)
        begin = time.perf_counter()
        losses.append(engine.train_step([batches], 1e-4)[0].loss / batches.step_answer_tokens)
        card.synchronise(scene.dry)
        seconds.append(time.perf_counter() - begin)
        if each:
            each([round(s, 3) for s in seconds])
    seconds = seconds[warm_up:]
    one = statistics.median(seconds)
    tokens = sum(batch.input_ids.size for batch in batches.micro)
    found = {"s a step": round(one, 4), "least s": round(min(seconds), 4), "most s": round(max(seconds), 4)}
    found |= {"tokens/s": round(tokens / one), "losses": [round(loss, 6) for loss in losses]}
    return found | loads_of(engine, repeat) | card.peaks(scene.dry)


def take_loads(engine):
    """Return the engine's loads since the last call; None for an engine that loads nothing."""
    return engine.store.take_loads() if hasattr(engine, "store") else None


def loads_of(engine, steps: int) -> dict:
    """Return the averages of a step: loads of units, their GiB, and seconds that the arithmetic waited."""
    taken = take_loads(engine)
    if taken is None:
        return {}
    return {
        "loads": round(taken.count / steps, 1),
        "loaded GiB": round(sum(taken.bytes.values()) / steps / card.GIB, 3),
        "waited s": round(taken.waited_s / steps, 4),
    }

"""A model that does not fit under a cap on the card's memory, beside its arithmetic alone: tokens/s, memory, loads, predictions."""

from dataclasses import dataclass

from benchmarks.gpu import card, predicted
from benchmarks.gpu.engines import Recipe, Scene, engine_of, measure
from benchmarks.gpu.record import LeftOut
from benchmarks.gpu.shapes import Step, model_of, step_of, write_model
from fedspeed.engine.config import EngineConfig

STEPS = (Step("8k", tokens=4096, micro=2), Step("32k", tokens=4096, micro=8))
REPEAT = 3
BUILD_S = 2.5  # per GiB of the base: drawing, copying, page-locking; a guess on the safe side, until a card has told


@dataclass(frozen=True)
class Way:
    """An engine, and the steps that are measured on it.

    Attributes:
        slots: 0 for as many as the planner finds room for.
        arithmetic: whether it has all the card, every block in a slot and recomputes as the others do: the step without its loads.
    """

    name: str
    steps: tuple[Step, ...]
    slots: int = 0
    arithmetic: bool = False
    options: EngineConfig = EngineConfig(tier="ram")


WAYS = (
    Way("planned", STEPS),
    Way("arithmetic", STEPS, arithmetic=True),
    Way("two slots, inputs in RAM, all recomputed", STEPS[:1], slots=2,
        options=EngineConfig(tier="ram", block_inputs="host", activation_gib=0.0)),
)


def run(scene: Scene) -> None:
    """Measure one engine after another: building one takes longer than its steps."""
    card.join(scene.dry)
    shape = model_of(scene.phase.options["model"], scene.dry)
    base = write_model(scene.folder / "model", shape)
    where = predicted.node(scene.out, scene.dry)
    for way in WAYS:
        with scene.record.guarded(way.name):
            # The first is worth trying in whatever time there is: a step that was measured stays.
            scene.record.need(0 if way is WAYS[0] or scene.dry else 15 + BUILD_S * shape.total * 2 / card.GIB)
            run_way(scene, way, shape, base, where)
    beside_arithmetic(scene)


def run_way(scene: Scene, way: Way, shape, base, where) -> None:
    """Build the engine of a way and measure its steps."""
    steps = [step_of(step, scene.dry) for step in way.steps]
    cap = 0 if way.arithmetic else scene.phase.options["cap"]
    card.cap(cap, scene.dry)
    slots, predictions = plan(way, shape, steps, where, cap)
    with engine_of(scene, base, Recipe(options_of(way, slots))) as engine:
        scene.record.note(f"{way.name}: built s", round(scene.record.seconds, 1))
        for step in steps:
            name = f"{step.name} {way.name}"
            with scene.record.guarded(name):
                found = measure(scene, engine, step.batches(shape.vocab), REPEAT)
                found |= {"slots": slots} | (predictions[step.name].result if step.name in predictions else {})
                scene.record.note(name, found)


def plan(way: Way, shape, steps: list[Step], where, cap: float) -> tuple[int, dict]:
    """(slots of a way's engine, what the planner says of its steps with them, by the step's name)."""
    if way.arithmetic:
        return shape.layers, {}
    if where is None and not way.slots:
        raise LeftOut("neither a probe nor published facts of this card, so that the planner cannot choose; run the phase link first")
    if where is None:
        return way.slots, {}
    if way.slots:
        host = {step.name: predicted.setting_of(step, way.slots, "host") for step in steps}
        return way.slots, {step.name: predicted.predict(shape, step, host[step.name], where) for step in steps}
    alone = {step.name: predicted.within(shape, step, where, cap) for step in steps}
    slots = min(found.setting.slots for found in alone.values())
    return slots, {step.name: predicted.with_slots(shape, step, alone[step.name], slots, where) for step in steps}


def options_of(way: Way, slots: int) -> EngineConfig:
    """The engine's settings."""
    from dataclasses import replace

    if way.arithmetic:
        return replace(way.options, slots=slots, block_inputs="device", activation_gib=0.0)
    return replace(way.options, slots=slots)


def beside_arithmetic(scene: Scene) -> None:
    """Add to each step its speed as a share of its arithmetic's."""
    results = scene.record.results
    for way in WAYS:
        for step in way.steps:
            name = f"{step.name} {way.name}"
            alone = results.get(f"{step.name} arithmetic", {})
            if "s a step" in results.get(name, {}) and "s a step" in alone and not way.arithmetic:
                scene.record.note(name, results[name] | {"of arithmetic": round(alone["s a step"] / results[name]["s a step"], 3)})

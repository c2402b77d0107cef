"""A model that does not fit under a cap on the card's memory, beside its arithmetic alone."""

from dataclasses import dataclass, replace

from benchmarks.gpu import card, predicted
from benchmarks.gpu.engines import Recipe, Scene, engine_of, measure
from benchmarks.gpu.record import LeftOut
from benchmarks.gpu.shapes import Step, model_of, step_of, write_model
from fedspeed.engine.config import EngineConfig

STEPS = (Step("8k", tokens=4096, micro=2), Step("32k", tokens=4096, micro=8))
REPEAT = 3
STEP_S = 5.0  # what is left when an engine has been built should be more


@dataclass(frozen=True)
class Way:
    """An engine, and the steps that are measured on it.

    Attributes:
        slots: 0 for as many as the planner finds room for.
        arithmetic: whether it has all the card and every block in a slot, and recomputes everything: the step
            without its loads.
    """

    name: str
    steps: tuple[Step, ...]
    slots: int = 0
    arithmetic: bool = False
    options: EngineConfig = EngineConfig(tier="ram")


WAYS = (
    Way("planned", STEPS),
    Way("arithmetic", STEPS, arithmetic=True),
    Way(
        "two slots, inputs in RAM, all recomputed",
        STEPS[:1],
        slots=2,
        options=EngineConfig(tier="ram", block_inputs="host", activation_gib=0.0),
    ),
)


def run(scene: Scene) -> None:
    """Measure one engine after another: building one takes longer than its steps."""
    card.join(scene.dry)
    shape = model_of(scene.phase.options["model"], scene.dry)
    base = write_model(scene.folder / "model", shape)
    where = predicted.node(scene.out, scene.dry)
    build_s = 0.0  # of the first one
    for way in WAYS:
        with scene.record.guarded(way.name):
            scene.record.need(build_s + STEP_S)
            took = run_way(scene, way, shape, base, where)
            build_s = build_s or took


def run_way(scene: Scene, way: Way, shape, base, where) -> float:
    """Build the engine of a way and measure its steps; the seconds that building took."""
    steps = [step_of(step, scene.dry) for step in way.steps]
    cap = 0 if way.arithmetic else scene.phase.options["cap"]
    card.cap(cap, scene.dry)
    slots, predictions = plan(way, shape, steps, where, cap)
    begin = scene.record.seconds
    with engine_of(scene, base, Recipe(options_of(way, slots))) as engine:
        took = scene.record.seconds - begin
        scene.record.note(f"{way.name}: built in s", round(took, 1))
        for step in steps:
            with scene.record.guarded(_name(step, way)):
                found = measure(scene, engine, step.batches(shape.vocab), REPEAT)
                found |= {"slots": slots} | (
                    predictions[step.name].result if step.name in predictions else {}
                )
                scene.record.note(_name(step, way), found)
                beside_arithmetic(scene.record, step)
    return took


def beside_arithmetic(record, step: Step) -> None:
    """Add to what is known of a step its speed as a share of its arithmetic's, as soon as both are known."""
    by_way = {way: record.results.get(_name(step, way), {}) for way in WAYS}
    alone = next(
        (found["s a step"] for way, found in by_way.items() if way.arithmetic and "s a step" in found), None
    )
    for way, found in by_way.items():
        if alone and not way.arithmetic and "s a step" in found and "of arithmetic" not in found:
            record.note(_name(step, way), found | {"of arithmetic": round(alone / found["s a step"], 3)})


def _name(step: Step, way: Way) -> str:
    return f"{step.name} {way.name}"


def plan(way: Way, shape, steps: list[Step], where, cap: float) -> tuple[int, dict]:
    """(slots of a way's engine, what the planner says of its steps with them, by the step's name)."""
    if way.arithmetic:
        return shape.layers, {}
    if where is None and not way.slots:
        raise LeftOut(
            "there is neither a probe nor published facts of this card to plan with; run the phase link first"
        )
    if where is None:
        return way.slots, {}
    if way.slots:
        host = {step.name: predicted.setting_of(step, way.slots, "host") for step in steps}
        return way.slots, {
            step.name: predicted.predict(shape, step, host[step.name], where) for step in steps
        }
    alone = {step.name: predicted.within(shape, step, where, cap) for step in steps}
    slots = min(found.setting.slots for found in alone.values())
    return slots, {
        step.name: predicted.with_slots(shape, step, alone[step.name], slots, where) for step in steps
    }


def options_of(way: Way, slots: int) -> EngineConfig:
    """The engine's settings."""
    if way.arithmetic:
        return replace(way.options, slots=slots, block_inputs="device", activation_gib=0.0)
    return replace(way.options, slots=slots)

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
        options: how it executes; None for the planner's choice for its first step.
        arithmetic: whether it has all the card and every block in a slot, and recomputes everything: the step
            without its loads.
    """

    name: str
    steps: tuple[Step, ...]
    options: EngineConfig | None = None
    arithmetic: bool = False

    @property
    def title(self) -> str:
        """Names it with its steps."""
        return f"{self.name} ({', '.join(step.name for step in self.steps)})"


RECOMPUTED = EngineConfig(tier="ram", block_slots=2, block_inputs="host", activation_gib=0.0)
WAYS = (
    Way("planned", STEPS[:1]),
    Way("arithmetic", STEPS, replace(RECOMPUTED, block_inputs="device"), arithmetic=True),
    Way("planned", STEPS[1:]),
    Way("two slots, inputs in RAM, all recomputed", STEPS[:1], RECOMPUTED),
)


def run(scene: Scene) -> None:
    """Measure one engine after another: building one takes longer than its steps."""
    card.join(scene.dry)
    shape = model_of(scene.phase.options["model"], scene.dry)
    base = write_model(scene.folder / "model", shape)
    where = predicted.node(scene.out, scene.dry)
    build_s = 0.0  # of the first one
    for way in WAYS:
        with scene.record.guarded(way.title):
            scene.record.need(build_s + STEP_S)
            took = run_way(scene, way, shape, base, where)
            build_s = build_s or took


def run_way(scene: Scene, way: Way, shape, base, where) -> float:
    """Build the engine of a way and measure its steps; the seconds that building took."""
    steps = [step_of(step, scene.dry) for step in way.steps]
    cap = 0 if way.arithmetic else scene.phase.options["cap"]
    card.cap(cap, scene.dry)
    options, predictions = plan(way, shape, steps, where, cap)
    begin = scene.record.seconds
    with engine_of(scene, base, Recipe(options)) as engine:
        took = scene.record.seconds - begin
        scene.record.note(f"{way.title}: built in s", round(took, 1))
        start = engine.state()
        for step in steps:
            engine.load(start, seed=5)  # the same losses, whatever was measured on this engine before
            with scene.record.guarded(_name(step, way)):
                found = measure(scene, engine, step.batches(shape.vocab), REPEAT)
                scene.record.note(_name(step, way), found | predictions.get(step.name, {}))
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


def plan(way: Way, shape, steps: list[Step], where, cap: float) -> tuple[EngineConfig, dict]:
    """(configuration of a way's engine, what the planner says of its steps in it, by the step's name)."""
    if way.arithmetic:
        return replace(way.options, block_slots=shape.layers), {}
    if way.options is None:
        if where is None:
            raise LeftOut(
                "there is neither a probe nor published facts of this card to plan with; run the phase link "
                "first"
            )
        chosen = predicted.within(shape, steps[0], where, cap)
        return predicted.options_of(chosen.setting), {steps[0].name: chosen.result}
    if where is None:
        return way.options, {}
    settings = [
        predicted.setting_of(step, way.options.block_slots, way.options.block_inputs) for step in steps
    ]
    found = [predicted.predict(shape, step, setting, where) for step, setting in zip(steps, settings)]
    return way.options, {step.name: one.result for step, one in zip(steps, found)}

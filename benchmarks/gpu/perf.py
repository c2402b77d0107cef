"""A model that does not fit under a cap on the card's memory, compared with its arithmetic alone."""

from dataclasses import dataclass, replace

from benchmarks.gpu import card, predicted
from benchmarks.gpu.engines import Recipe, Scene, engine_of, measure
from benchmarks.gpu.record import LeftOut
from benchmarks.gpu.shapes import Step, model_of, step_of, write_model
from fedspeed.engine.config import EngineConfig

STEPS = (Step("8k", tokens=4096, micro=2), Step("32k", tokens=4096, micro=8))
REPEAT = 3
STEP_S = 5.0  # minimum time that must remain after an engine has been built


@dataclass(frozen=True)
class Execution:
    """The configuration of an engine, and the steps that are measured on it.

    Attributes:
        options: None: the planner's choice for the first step. arithmetic: whether it may use the whole card,
            has every block in a slot and recomputes everything, which
            gives the step without its loads.
    """

    name: str
    steps: tuple[Step, ...]
    options: EngineConfig | None = None
    arithmetic: bool = False

    @property
    def title(self) -> str:
        """Return its name and its steps."""
        return f"{self.name} ({', '.join(step.name for step in self.steps)})"


RECOMPUTED = EngineConfig(tier="ram", block_slots=2, block_inputs="host", activation_gib=0.0)
EXECUTIONS = (
    Execution("planned", STEPS[:1]),
    Execution("arithmetic", STEPS, replace(RECOMPUTED, block_inputs="device"), arithmetic=True),
    Execution("planned", STEPS[1:]),
    Execution("two slots, inputs in RAM, all recomputed", STEPS[:1], RECOMPUTED),
)


def run(scene: Scene) -> None:
    """Measure one engine after another: building one takes longer than its steps."""
    card.join(scene.dry)
    shape = model_of(scene.phase.options["model"], scene.dry)
    base = write_model(scene.folder / "model", shape)
    where = predicted.node(scene.out, scene.dry)
    build_s = 0.0  # of the first one
    for execution in EXECUTIONS:
        with scene.record.guarded(execution.title):
            scene.record.need(build_s + STEP_S)
            took = run_execution(scene, execution, shape, base, where)
            build_s = build_s or took


def run_execution(scene: Scene, execution: Execution, shape, base, where) -> float:
    """Build an engine and measure its steps. Return the seconds that building took."""
    steps = [step_of(step, scene.dry) for step in execution.steps]
    cap = 0 if execution.arithmetic else scene.phase.options["cap"]
    card.cap(cap, scene.dry)
    options, predictions = plan(execution, shape, steps, where, cap)
    begin = scene.record.seconds
    with engine_of(scene, base, Recipe(options)) as engine:
        took = scene.record.seconds - begin
        scene.record.note(f"{execution.title}: built in s", round(took, 1))
        start = engine.state()
        for step in steps:
            engine.load(start, seed=5)  # the same losses, whatever was measured on this engine before
            with scene.record.guarded(_name(step, execution)):
                found = measure(scene, engine, step.batches(shape.vocab), REPEAT)
                scene.record.note(_name(step, execution), found | predictions.get(step.name, {}))
                beside_arithmetic(scene.record, step)
    return took


def beside_arithmetic(record, step: Step) -> None:
    """Add a step's speed as a share of its arithmetic's to the results, as soon as both are known."""
    by_execution = {execution: record.results.get(_name(step, execution), {}) for execution in EXECUTIONS}
    alone = next(
        (
            found["s a step"]
            for execution, found in by_execution.items()
            if execution.arithmetic and "s a step" in found
        ),
        None,
    )
    for execution, found in by_execution.items():
        if alone and not execution.arithmetic and "s a step" in found and "of arithmetic" not in found:
            record.note(
                _name(step, execution), found | {"of arithmetic": round(alone / found["s a step"], 3)}
            )


def _name(step: Step, execution: Execution) -> str:
    return f"{step.name} {execution.name}"


def plan(execution: Execution, shape, steps: list[Step], where, cap: float) -> tuple[EngineConfig, dict]:
    """Return (configuration of the engine, the planner's predictions by the step's name)."""
    if execution.arithmetic:
        return replace(execution.options, block_slots=shape.layers), {}
    if execution.options is None:
        if where is None:
            raise LeftOut(
                "there is neither a probe nor published facts of this card to plan with; run the phase link "
                "first"
            )
        chosen = predicted.within(shape, steps[0], where, cap)
        return predicted.options_of(chosen.setting), {steps[0].name: chosen.result}
    if where is None:
        return execution.options, {}
    settings = [
        predicted.setting_of(step, execution.options.block_slots, execution.options.block_inputs)
        for step in steps
    ]
    found = [predicted.predict(shape, step, setting, where) for step, setting in zip(steps, settings)]
    return execution.options, {step.name: one.result for step, one in zip(steps, found)}

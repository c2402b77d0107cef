"""Engine options whose worth only a card can tell, each beside the same engine without it."""

from dataclasses import replace
from importlib.util import find_spec

from benchmarks.gpu import card, predicted
from benchmarks.gpu.engines import Recipe, Scene, measured
from benchmarks.gpu.record import LeftOut
from benchmarks.gpu.shapes import Step, model_of, step_of, write_model
from fedspeed.engine.config import EngineConfig

LARGE = Step("8k", tokens=4096, micro=2)
SMALL = Step("16 x 512", tokens=512, micro=16)
REPEAT = 5
NF4_SLOTS = 2


def accumulation(scene: Scene) -> None:
    """fp16 products with sums in fp32 and in fp16: speed, and what it does to the losses."""
    # DeepSpeed asks a CPU for instructions for fp16 that few have; bf16 runs the same code.
    recipe = Recipe(EngineConfig(tier="resident"), dtype="bf16" if scene.dry else "fp16")
    narrow = replace(recipe, options=replace(recipe.options, matmul="fp16_accumulation"))
    beside(scene, LARGE, {"fp32 accumulation": recipe, "fp16 accumulation": narrow})


def compiled(scene: Scene) -> None:
    """Small micro-batches, where a card waits for Python, with blocks as they are and compiled."""
    recipe = Recipe(EngineConfig(tier="resident"))
    beside(
        scene,
        SMALL,
        {
            "as they are": recipe,
            "compiled": replace(recipe, options=replace(recipe.options, compile_blocks=True)),
        },
    )


def beside(scene: Scene, step: Step, recipes: dict[str, Recipe]) -> None:
    """Measure the same step by several recipes; how the others compare with the first is added to them."""
    card.join(scene.dry)
    shape = model_of(scene.phase.options["model"], scene.dry, scene.phase.options["blocks"])
    base = write_model(scene.folder / "model", shape)
    batches = step_of(step, scene.dry).batches(shape.vocab)
    first = None
    for name, recipe in recipes.items():
        with scene.record.guarded(name):
            found = measured(scene, base, recipe, batches, name=name, repeat=REPEAT)
            first = first or found
            off = max(abs(loss / other - 1) for loss, other in zip(found["losses"], first["losses"]))
            found |= {
                "of the first's speed": round(first["s a step"] / found["s a step"], 3),
                "losses off": float(f"{off:.2e}"),
            }
            scene.record.note(name, found)


def nf4(scene: Scene) -> None:
    """Measure a base in 4 bits that stays on the device, under a cap."""
    with scene.record.guarded("8k nf4"):
        if find_spec("bitsandbytes") is None:
            raise LeftOut("bitsandbytes is not installed; see requirements-quantised.txt")
        card.join(scene.dry)
        card.cap(scene.phase.options["cap"], scene.dry)
        shape = model_of(scene.phase.options["model"], scene.dry)
        base = write_model(scene.folder / "model", shape)
        step = step_of(LARGE, scene.dry)
        where = predicted.node(scene.out, scene.dry)
        setting = predicted.setting_of(step, NF4_SLOTS, tier="nf4")
        expected = predicted.predict(shape, step, setting, where).result if where else {}
        recipe = Recipe(predicted.options_of(setting))
        found = measured(scene, base, recipe, step.batches(shape.vocab), name="8k nf4", repeat=REPEAT)
        scene.record.note("8k nf4", found | expected)

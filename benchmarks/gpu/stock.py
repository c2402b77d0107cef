"""DeepSpeed's own ZeRO-3 offload under the same cap and on the same rows as ours."""

from dataclasses import replace

from benchmarks.gpu import card, predicted
from benchmarks.gpu.engines import Recipe, Scene, measured
from benchmarks.gpu.shapes import Step, model_of, step_of, write_model
from fedspeed.engine.config import EngineConfig

ROWS = Step("16 x 512", tokens=512, micro=16)
AT_ONCE = 8  # rows of one of our micro-batches: a division of the same rows, which changes no sum
SLOTS = 8
TOLERANCE = 2e-2  # bf16 rounds: each of them computes the products of a micro-batch of another size
WARM_UP = 2  # steps: ZeRO-3 records the order of its parameters in the first two


def run(scene: Scene) -> None:
    """Ours first, which takes the least time; then stock's steps, each noted when it has ended."""
    card.join(scene.dry)
    shape = model_of(scene.phase.options["model"], scene.dry)
    base = write_model(scene.folder / "model", shape)
    card.cap(scene.phase.options["cap"], scene.dry)
    theirs = step_of(ROWS, scene.dry)
    at_once = min(AT_ONCE, theirs.micro // 2)
    ours = replace(
        theirs,
        name=f"{theirs.micro // at_once} x {at_once} x {theirs.tokens}",
        micro=theirs.micro // at_once,
        rows=at_once,
    )
    record = scene.record
    with record.guarded("ours"):
        where = predicted.node(scene.out, scene.dry)
        planned = predicted.within(shape, ours, where, scene.phase.options["cap"]) if where else None
        options = (
            predicted.options_of(planned.setting) if planned else EngineConfig(tier="ram", block_slots=SLOTS)
        )
        found = measured(scene, base, Recipe(options), ours.batches(shape.vocab), name="ours", repeat=3)
        record.note("ours", found | (planned.result if planned else {}))
    with record.guarded("stock ZeRO-3 offload"):
        recipe = Recipe(EngineConfig(tier="stock", activation_checkpointing=True), stage=3, offload=True)
        found = measured(
            scene,
            base,
            recipe,
            theirs.batches(shape.vocab),
            name="stock",
            repeat=2,
            warm_up=WARM_UP,
            each=lambda seconds: record.note(f"stock: seconds of its steps, {WARM_UP} to warm up", seconds),
        )
        record.note("stock ZeRO-3 offload", found)
    with record.guarded("comparison"):
        if {"ours", "stock ZeRO-3 offload"} <= record.results.keys():
            record.note("comparison", compare(record.results["ours"], record.results["stock ZeRO-3 offload"]))


def compare(ours: dict, stock: dict) -> dict:
    """How much faster ours is, and whether both have the same losses; a failure where not."""
    if "losses" not in ours or "losses" not in stock:
        return {"left out": "one of the two has no losses"}
    off = max(abs(a / b - 1) for a, b in zip(ours["losses"], stock["losses"]))
    found = {
        "times the speed of stock": round(ours["tokens/s"] / stock["tokens/s"], 2),
        "losses off": float(f"{off:.2e}"),
    }
    if not off <= TOLERANCE:
        found["failed"] = f"the losses of ours and stock differ by {off:.2e}, more than {TOLERANCE:g}"
    return found

"""Whether every way to execute a model computes the same on the card, by the losses of a tiny one."""

from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.gpu import card
from benchmarks.gpu.engines import Recipe, Scene, engine_of
from benchmarks.gpu.record import LeftOut
from benchmarks.gpu.shapes import TINY, Step, write_model
from fedspeed.engine.config import EngineConfig
from fedspeed.schedule.limits import QUANTISED

STEP = Step("smoke", tokens=64, micro=3, rows=2)
PADDED = 9  # tokens at the end of one row
STEPS = 3
DRY_STEP = Step("smoke", tokens=32, micro=2, rows=2)
DRY_STEPS = 2
# Relative to the first of a type: what another order of sums may change. A quantised base has other losses.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
QUANTISED_TOLERANCE = 0.1


@dataclass(frozen=True)
class Case:
    """One way to execute the model, and the name it is reported under."""

    name: str
    recipe: Recipe


def case(
    dtype: str, tier: str, dropout: float = 0.0, stage: int = 2, offload: bool = False, **options
) -> Case:
    """Return a case whose name lists its unusual settings."""
    words = [dtype, tier] + [f"{name}={value}" for name, value in options.items()]
    words += [f"dropout={dropout}"] if dropout else []
    if tier == "stock":
        words.append(f"zero{stage} offload" if offload else f"zero{stage}")
    recipe = Recipe(EngineConfig(tier=tier, **options), dtype, stage, offload, dropout)
    return Case(" ".join(words), recipe)


# Also in a dry run; the tests of the engine look at every tier on a CPU.
FEW = (
    case("fp32", "resident"),
    case("fp32", "ram"),
    case("bf16", "resident"),
    case("bf16", "ram"),
    case("fp32", "ram", block_slots=4, block_inputs="device"),
    case("fp32", "nvme"),
    case("fp32", "ram", dropout=0.2),
    case("bf16", "nf4"),
    case("fp32", "stock", stage=3, offload=True, activation_checkpointing=True),
)
MORE = (
    case("fp16", "resident"),
    case("fp16", "ram"),
    case("fp32", "ram", block_slots=1),
    case("fp32", "ram", block_slots=3),
    case("fp32", "ram", resident_blocks=2),
    case("fp32", "ram", block_inputs="host", activation_gib=0.0),
    case("fp32", "client"),
    case("fp32", "resident", dropout=0.2),
    case("bf16", "int8"),
    case("fp32", "stock", stage=0),
    case("bf16", "stock", stage=2),
)


def run(scene: Scene) -> None:
    """Train each case from the same weights on the same rows; compare its losses with the first of a type."""
    card.join(scene.dry)
    scene.record.note("joined s", round(scene.record.seconds, 1))
    base = write_model(scene.folder / "tiny", TINY)
    first: dict[tuple[str, float], list[float]] = {}
    for one in FEW if scene.dry else (*FEW, *MORE):
        with scene.record.guarded(one.name):
            if one.recipe.options.tier in QUANTISED and find_spec("bitsandbytes") is None:
                raise LeftOut("bitsandbytes is not installed")
            losses, mib = train(scene, base, one.recipe)
            reference = first.setdefault((one.recipe.dtype, one.recipe.dropout), losses)
            scene.record.note(one.name, verdict(one.recipe, losses, reference) | {"peak MiB": mib})


def train(scene: Scene, base, recipe: Recipe) -> tuple[list[float], int]:
    """(losses of some steps and of an evaluation after them, MiB that tensors took)."""
    step, steps = (DRY_STEP, DRY_STEPS) if scene.dry else (STEP, STEPS)
    batches = step.batches(TINY.vocab)
    for batch in batches.micro:
        batch.attention_mask[0, -PADDED:] = 0
        batch.labels[0, -PADDED:] = -100
    with engine_of(scene, base, recipe) as engine:
        card.forget_peaks(scene.dry)
        losses = [
            engine.train_step([batches], 1e-2)[0].loss / batches.step_answer_tokens for _ in range(steps)
        ]
        losses.append(engine.evaluate([batches.micro])[0].mean_loss)
        return losses, engine.device_bytes >> 20


def verdict(recipe: Recipe, losses: list[float], reference: list[float]) -> dict:
    """Return the losses and their deviation from the reference; fail if it is too large."""
    off = max(abs(loss / other - 1) for loss, other in zip(losses, reference))
    limit = QUANTISED_TOLERANCE if recipe.options.tier in QUANTISED else TOLERANCE[recipe.dtype]
    found = {"losses": [round(loss, 5) for loss in losses], "off": float(f"{off:.2e}")}
    if not off <= limit:  # NaN is not either
        found["failed"] = (
            f"losses differ by {off:.2e} from those of the first case of this type, more than {limit:g}"
        )
    return found

"""The registry of evaluation tasks. It imports no task and no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_TASKS = "fedspeed.evaluation.tasks"

# Sets of questions with given answers, by the name of their task and file: how they are called.
QA_SETS = {
    "boolq": "BoolQ, 3 270 yes/no questions on a passage",
    "arc_easy": "ARC easy, 2 376 science questions",
    "arc_challenge": "ARC challenge, 1 172 science questions",
    "piqa": "PIQA, 1 838 questions on everyday actions",
    "winogrande": "WinoGrande, 1 267 sentences with a pronoun",
    "copa": "COPA, 100 causes and effects",
}
# Languages of HumanEval-X besides Python, whose exercises are those of HumanEval.
HUMANEVAL_X = {"cpp": "C++", "go": "Go", "java": "Java", "js": "JavaScript"}


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation tasks on the common model while a run goes on."""

    tasks: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "evaluation tasks (`fedspeed eval --list`) that the common model is scored on; "
            "`evaluation: [gsm8k, held_out]` is short for it"
        },
    )
    every: int = field(
        default=5,
        metadata={
            "help": "rounds from one such evaluation to the next; also before round 1 and after the last",
            "min": 1,
        },
    )
    limit: int = field(default=100, metadata={"help": "most items of each task, 0: all", "min": 0})
    unsafe: bool = field(
        default=False,
        metadata={"help": "run generated code where no sandbox can be built (docs/evaluation.md)"},
    )


@dataclass(frozen=True, kw_only=True)
class EvalTaskEntry:
    """Describe an evaluation task to those that do not load it.

    Attributes:
        module: defines `make(context: TaskContext) -> EvalTask`.
        help: one line for `fedspeed eval --list`.
        options: passed to `make` in the context, so that one module can serve several tasks.
        unit: of its main score: a share between 0 and 1, or a loss in nats per token.
        private: whether the items are clients' own rows, so that transforms of updates may have to hide the
            score.
        runs_code: whether answers are executed, which needs the sandbox.
    """

    module: str
    help: str
    options: Mapping[str, Any] = field(default_factory=dict)
    unit: Literal["accuracy", "loss"] = "accuracy"
    private: bool = False
    runs_code: bool = False


EVAL_TASKS: dict[str, EvalTaskEntry] = {
    "held_out": EvalTaskEntry(
        module=f"{_TASKS}.held_out",
        help="loss per token and exact answers on held-out rows of the run, or of --held-out FILE",
        unit="loss",
        private=True,
    ),
    "exact_match": EvalTaskEntry(
        module=f"{_TASKS}.exact_match",
        help="share of generated answers that equal a held-out row's own",
        private=True,
    ),
    "answer_choice": EvalTaskEntry(
        module=f"{_TASKS}.answer_choice",
        help="share of held-out rows whose own answer is likelier than those of other rows",
        private=True,
    ),
    "gsm8k": EvalTaskEntry(
        module=f"{_TASKS}.gsm8k",
        help="GSM8K, 1 319 word problems after eight worked examples: share of right numbers",
        options={"few_shot": True},
    ),
    "gsm8k_zero_shot": EvalTaskEntry(
        module=f"{_TASKS}.gsm8k",
        help="GSM8K through the model's own template, without examples",
        options={"few_shot": False},
    ),
    "qa": EvalTaskEntry(
        module=f"{_TASKS}.choices",
        help=f"the {len(QA_SETS)} tasks below together; --limit is that of each",
        options={"sets": tuple(QA_SETS)},
    ),
    **{
        name: EvalTaskEntry(
            module=f"{_TASKS}.choices",
            help=f"{title}: share of questions whose right answer is the likeliest",
            options={"sets": (name,)},
        )
        for name, title in QA_SETS.items()
    },
    "humaneval": EvalTaskEntry(
        module=f"{_TASKS}.code.humaneval",
        help="HumanEval, 164 Python functions to complete: pass@k",
        options={"languages": ("python",)},
        runs_code=True,
    ),
    "humanevalx": EvalTaskEntry(
        module=f"{_TASKS}.code.humaneval",
        help=f"the {len(HUMANEVAL_X)} tasks below together, scored by language; --limit is that of each",
        options={"languages": tuple(HUMANEVAL_X)},
        runs_code=True,
    ),
    **{
        f"humanevalx_{name}": EvalTaskEntry(
            module=f"{_TASKS}.code.humaneval",
            help=f"HumanEval-X, 164 {title} functions to complete: pass@k",
            options={"languages": (name,)},
            runs_code=True,
        )
        for name, title in HUMANEVAL_X.items()
    },
}

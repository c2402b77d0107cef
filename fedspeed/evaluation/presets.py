"""Named collections of evaluation tasks: the four boards of the FlowerTune LLM leaderboard."""

import difflib
from dataclasses import dataclass

from fedspeed.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Evaluation tasks under one name.

    Attributes:
        help: one line for `fedspeed eval --list`.
        tasks: names of evaluation tasks of ours. harness: names of tasks of lm-evaluation-harness.
    """

    help: str
    tasks: tuple[str, ...] = ()
    harness: tuple[str, ...] = ()


PRESETS = {
    "flowertune_general": Preset(
        help="MMLU in three categories: STEM, social sciences, humanities",
        harness=("mmlu_stem", "mmlu_social_sciences", "mmlu_humanities"),
    ),
    "flowertune_finance": Preset(
        help="sentiment of financial news and posts: FPB, FiQA, TFNS",
        harness=("flowertune_fpb", "flowertune_fiqa", "flowertune_tfns"),
    ),
    "flowertune_medical": Preset(
        help="medical questions: PubMedQA, MedMCQA, MedQA, CareQA",
        harness=("pubmedqa", "medmcqa", "medqa_4options", "careqa_en"),
    ),
    "flowertune_code": Preset(
        help="HumanEval, and HumanEval-X in JavaScript and C++ in place of MultiPL-E; without MBPP",
        tasks=("humaneval", "humanevalx_js", "humanevalx_cpp"),
    ),
}
UNOFFICIAL = "unofficial: not the board's own program, prompts and numbers may differ"


def preset_of(name: str) -> Preset:
    """Return a preset.

    Raises:
        ConfigError: there is no such preset, with similar names.
    """
    if name in PRESETS:
        return PRESETS[name]
    similar = difflib.get_close_matches(name, PRESETS, n=2) or list(PRESETS)
    raise ConfigError(f"--preset {name}: there is no such preset; did you mean {', '.join(similar)}?")

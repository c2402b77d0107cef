"""Every family, with all its special features on, against transformers and PEFT alone. The whole table of
families and executions is `python benchmarks/families.py`.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedspeed.engine.generation.interface import Generating
from fedspeed.errors import ModelError
from fedspeed.models.families.experts import STACKED
from fedspeed.models.families.registry import FAMILIES
from tests.engine.engines import in_world
from tests.engine.families import PIPELINE, Differences, by_engine, by_transformers, compare
from tests.engine.family_bases import WRITTEN, configuration, write_base, write_kept
from tests.processes import run_clusters

TOLERANCE = 3e-6
SEEN = 1e-3  # the smallest difference that rounding cannot explain
KEPT = (0, 2, 3)  # of four blocks
GATE_UP = STACKED[0]
# Features of one family each, without which the engine would compute something else.
LEFT_OUT = {
    "the scale of embeddings": ("gemma3_text", {"embed": lambda looked_up, config: looked_up}),
    "the cap of logits": ("gemma3_text", {"logits": lambda raw, config: raw}),
    "the scale of logits": ("granite", {"logits": lambda raw, config: raw}),
    "the window of a cache": ("mistral", {"masks": "causal"}),
    "that gate comes before up": (
        "qwen3_moe",
        {"stacked": (replace(GATE_UP, matrices=GATE_UP.matrices[::-1]), *STACKED[1:])},
    ),
}
# Families with several kinds of blocks or with parts that Llama lacks, which a cut into stages could break.
PIPELINED = ("gemma3_text", "smollm3", "qwen3", "gpt_neox", "phi3", "granite", "gpt2", "qwen3_moe")


def of_single_ranks(rank, folder) -> dict[str, Differences]:
    """Compare all that is computed by one rank; by what it is."""
    found = {}
    bases = {}
    plain = {}
    for number, family in enumerate(WRITTEN):
        bases[family] = write_base(family, folder / family)
        plain[family] = by_transformers(family, bases[family], "all-linear", True)
        for kind in ("zero0", "ram"):
            measured = by_engine(bases[family], kind, "all-linear", True)
            found[f"{family} {kind}"] = compare(measured, plain[family])
        tied = write_base(family, folder / f"{family}-tied", tied=True)
        kind = ("nvme", "resident")[number % 2]
        measured = by_engine(tied, kind, "attention", False, nvme=folder)
        found[f"{family} tied {kind}"] = compare(measured, by_transformers(family, tied, "attention", False))
    for family in ("smollm3", "gemma3_text"):
        kept = write_kept(bases[family], KEPT, folder / f"{family}-kept")
        expected = by_transformers(family, kept, "all-linear", True)
        measured = by_engine(bases[family], "ram", "all-linear", True, blocks=KEPT)
        found[f"{family} kept"] = compare(
            measured, replace(expected, gradients=_numbered(expected.gradients))
        )
    for name, (family, less) in LEFT_OUT.items():
        whole = FAMILIES[family]
        FAMILIES[family] = replace(whole, **less)
        found[name] = compare(by_engine(bases[family], "resident", "all-linear", True), plain[family])
        FAMILIES[family] = whole
    return found


def _numbered(gradients):
    """Name the gradients of kept blocks by the blocks' numbers in the whole model."""
    named = {}
    for name, gradient in gradients.items():
        before, _, rest = name.partition(".layers.")
        position, _, rest = rest.partition(".")
        named[f"{before}.layers.{KEPT[int(position)]}.{rest}"] = gradient
    return named


def of_pipelines(rank, folder) -> dict[str, Differences]:
    """Compare what two stages compute together."""
    from deepspeed import comm as dist

    found = {}
    for family in PIPELINED:
        base = folder / family
        if rank == 0:
            write_base(family, base)
        dist.barrier()
        measured = by_engine(str(base), "resident", "all-linear", True, ranks=2, options=PIPELINE)
        if rank == 0:
            expected = by_transformers(family, str(base), "all-linear", True)
            found[family] = compare(measured, expected)
    return found


def test_every_family_computes_what_transformers_does(tmp_path):
    [found] = run_clusters([1], in_world, of_single_ranks, tmp_path)
    seen = {name: found.pop(name).largest for name in LEFT_OUT}
    assert {name: differences for name, differences in found.items() if differences.largest > TOLERANCE} == {}
    assert {name: largest for name, largest in seen.items() if largest < SEEN} == {}


@pytest.mark.slow
def test_two_stages_compute_what_transformers_does(tmp_path):
    found, _ = run_clusters([2], in_world, of_pipelines, tmp_path)
    assert {name: differences for name, differences in found.items() if differences.largest > TOLERANCE} == {}


def test_every_registered_family_is_compared():
    assert set(FAMILIES) <= set(WRITTEN)


def test_scaled_embeddings_are_rounded_as_transformers_rounds_them():
    """The factor is rounded to the weights' type before it multiplies."""
    import torch
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    config = configuration("gemma3_text", tied=True)
    config.hidden_size = 2304  # its root, 48, is exact in bf16; that of 1152 is not
    for hidden in (2304, 1152):
        config.hidden_size = hidden
        module = Gemma3TextScaledWordEmbedding(8, hidden, 0, embed_scale=hidden**0.5).to(torch.bfloat16)
        looked_up = torch.nn.functional.embedding(torch.arange(8), module.weight)
        found = FAMILIES["gemma3_text"].embed(looked_up, config)
        assert found.dtype == torch.bfloat16 and torch.equal(found, module(torch.arange(8)))


@pytest.mark.parametrize("family,kinds", [("llama", 1), ("gpt2", 4), ("smollm3", 4), ("gemma3_text", 2)])
def test_blocks_share_compiled_code_only_where_they_compute_alike(family, kinds):
    import torch
    from transformers import AutoModelForCausalLM

    from fedspeed.engine.compute.compiled import CompiledBlocks
    from fedspeed.models.blocks import decoder_blocks

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(family, tied=False))
    assert len(CompiledBlocks(decoder_blocks(model))._function_of) == kinds


def test_rows_at_whose_length_the_rotary_scaling_changes_are_refused():
    """Keys in the cache would have been rotated by the frequencies of shorter rows."""
    model = SimpleNamespace(config=configuration("phi3", tied=False))
    Generating._check(SimpleNamespace(model=model), [20, 29], 3)
    with pytest.raises(ModelError, match=r"prompt 1 has 30 tokens, .* longer than 32 tokens"):
        Generating._check(SimpleNamespace(model=model), [20, 30], 3)
    model.config = configuration("gemma3_text", tied=False)
    Generating._check(SimpleNamespace(model=model), [20, 30], 3)

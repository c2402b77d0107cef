"""Tiny models, as files for the real loading code, and batches."""

import numpy as np

from fedspeed.config.run import RunConfig
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.monitor.trace import NoTrace


def write_llama(
    folder, hidden=64, layers=2, vocab=260, intermediate=128, *, heads=4, kv_heads=2, seed=0, **kwargs
):
    """Write a random Llama as a Hugging Face folder and return the folder as text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **kwargs,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def random_step(
    seed: int,
    micro: int,
    accumulation: int,
    ranks: int = 1,
    rank: int = 0,
    *,
    vocab: int = 260,
    length: int = 24,
) -> StepBatches:
    """Return a step of a rank with rows that depend on the seed only, so that all divisions into ranks and
    micro-batches have the same rows.
    """
    rng = np.random.default_rng(seed)
    rows = ranks * micro * accumulation
    ids = rng.integers(3, vocab, (rows, length))
    labels = ids.copy()
    for row, start in enumerate(rng.integers(2, length - 4, rows)):
        labels[row, :start] = -100
    total = int((labels[:, 1:] != -100).sum())
    mine = np.arange(rows).reshape(accumulation, ranks, micro)[:, rank]
    return StepBatches(
        [Batch(ids[m], labels[m], np.ones_like(ids[m]), int((labels[m][:, 1:] != -100).sum())) for m in mine],
        total,
    )


def run_config(**sections) -> RunConfig:
    """Make a RunConfig with some fields of its sections replaced, as `model={"base": ...}` or
    `federation={"method": {"name": "flexlora"}}`.
    """
    from dataclasses import replace

    from fedspeed.config.run import METHOD_VARIANTS, UPDATE_VARIANTS

    config = RunConfig()
    federation = dict(sections.get("federation", {}))
    if method := federation.get("method"):
        federation["method"] = METHOD_VARIANTS[method["name"]](**method)
    if updates := federation.get("updates"):
        federation["updates"] = tuple(UPDATE_VARIANTS[update["name"]](**update) for update in updates)
    sections["federation"] = federation
    return replace(
        config,
        **{
            name: replace(getattr(config, name), **values) if name != "deepspeed" else values
            for name, values in sections.items()
        },
    )


class NoClock:
    """A stage clock that does nothing."""

    trace = NoTrace()

    def stage(self, name):
        import contextlib

        return contextlib.nullcontext()

"""Attention without a mask for padding on the right, and repeated keys on cards without grouped queries."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.engine.compute.micro_batches import check_padding
from tests.engine.engines import engine
from tests.processes import run_clusters
from tests.tiny import random_step


def padded_step():
    """Return two rows, one of which ends early. The ids behind its end are ordinary tokens, so that attending
    to them would change the result.
    """
    step = random_step(4, 2, 1)
    step.micro[0].attention_mask[0, -7:] = 0
    step.micro[0].labels[0, -7:] = -100
    return step


def losses_of(rank, base, kinds, nvme):
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    found = {}
    for kind in kinds:
        with engine(base, kind, nvme=nvme, join=False) as client_engine:
            found[kind] = client_engine.evaluate([padded_step().micro])[0].loss
            client_engine.close()
    leave_world()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_padding_on_the_right_needs_no_mask(bases, tmp_path, family):
    """Compare with transformers, which is given the padding mask."""
    import torch
    from transformers import AutoModelForCausalLM

    [found] = run_clusters([1], losses_of, bases[family], ("resident", "zero0"), tmp_path)
    batch = padded_step().micro[0]
    model = AutoModelForCausalLM.from_pretrained(
        bases[family], attn_implementation="eager", dtype=torch.float32
    )
    ids, labels, mask = (
        torch.from_numpy(array) for array in (batch.input_ids, batch.labels, batch.attention_mask)
    )
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    ).item()
    assert found == {kind: pytest.approx(expected, rel=1e-5) for kind in found}


def test_padding_elsewhere_is_met():
    batch = padded_step().micro[0]
    check_padding(batch)
    with pytest.raises(AssertionError, match="not on the right"):
        check_padding(replace(batch, attention_mask=np.flip(batch.attention_mask, 1)))


def test_repeated_keys_give_what_grouped_queries_give(bases, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from fedspeed.engine.attention import choose_attention

    asked = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **kwargs):
        asked.append((args[0].shape[1] == args[1].shape[1], kwargs.get("enable_gqa", False)))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(
        "deepspeed.accelerator.get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda")
    )
    ids = torch.arange(3, 27)[None]
    for family in ("llama", "qwen2"):
        model = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
        outputs = []
        for capability in ((8, 0), (7, 5)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
            choose_attention(model)
            asked.clear()
            outputs.append((model(input_ids=ids).logits, set(asked)))
        (grouped, as_usual), (repeated, on_turing) = outputs
        assert any(gqa for _, gqa in as_usual), "with a newer card transformers groups queries"
        assert on_turing == {(True, False)}
        assert torch.allclose(grouped, repeated, atol=1e-5)

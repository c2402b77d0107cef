"""Rows longer than a base has positions for: refused where its position table ends, noted where it was not
trained on longer rows.
"""

import json

import pytest

from fedspeed.errors import ModelError
from fedspeed.models.positions import check_length, rotary_reach, row_limit


def base(folder, **config) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "length", "end"),
    [
        ({"n_positions": 64}, 64, None),
        ({"n_positions": 60}, 60, None),
        ({"n_positions": 64}, 65, 64),
        ({}, 1025, 1024),
        ({}, 1024, None),
    ],
)
def test_a_table_of_positions_has_an_end(tmp_path, config, length, end):
    place = base(tmp_path, model_type="gpt2", **config)
    for name in (place, f"{place}/config.json"):
        if end is None:
            assert check_length(name, length) == []
        else:
            with pytest.raises(
                ModelError, match=f"data.max_tokens={length}: .*{end} positions .*set data.max_tokens={end}$"
            ):
                check_length(name, length)


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        (
            {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            512,
        ),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 1024),
        ({}, 0),
    ],
)
def test_how_far_rotated_positions_reach(tmp_path, config, reach):
    assert rotary_reach(config) == reach
    place = base(tmp_path, model_type="llama", **config)
    if "dynamic" in str(config):
        with pytest.raises(ModelError, match="data.max_tokens=513: .*type dynamic.*set data.max_tokens=512"):
            check_length(place, 513)
        return
    assert check_length(place, reach or 10**6) == []
    if reach:
        [note] = check_length(place, reach + 1)
        assert (
            f"data.max_tokens={reach + 1}" in note and f"{reach} positions" in note and "rope_scaling" in note
        )


def test_a_base_that_is_not_at_hand_has_no_say(tmp_path):
    assert check_length("org/not-downloaded", 10**6) == check_length(str(tmp_path / "gone"), 10**6) == []


def test_rows_as_long_as_the_table_are_not_padded_beyond_it():
    """60 is no multiple of 8, which batches are padded to."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedspeed.data.batches import client_step, eval_batches
    from fedspeed.data.clients import ClientData
    from fedspeed.data.encode import Example

    rows = [Example(np.arange(length, dtype=np.int32) % 50, 2) for length in (60, 12, 59, 57)]
    data = ClientData(rows, rows[1:], pad_id=0, limit=60)
    step = client_step(data, 0, 0, 0, micro_batch=2, accumulation=2, ranks=1, client_rank=0)
    batches = [*step.micro, *eval_batches(rows, 2, 0, data.limit), *eval_batches(data.val, 1, 0, data.limit)]
    assert {batch.input_ids.shape[1] for batch in batches} == {16, 60}
    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=8, n_layer=1, n_head=2, vocab_size=50, n_positions=60, bos_token_id=1, eos_token_id=2
        )
    )
    with torch.no_grad():
        for batch in batches:
            assert model(input_ids=torch.from_numpy(batch.input_ids)).logits.isfinite().all()


PHI3 = {
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
}


@pytest.mark.parametrize(
    ("config", "limit", "kind"),
    [
        ({**PHI3, "original_max_position_embeddings": 2048}, 2048, "longrope"),
        (PHI3, 4096, "longrope"),
        ({**PHI3, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 4096, "yarn"),
        ({"model_type": "llama", "max_position_embeddings": 64}, None, ""),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 1024,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {"rope_type": "dynamic", "factor": 8.0},
                },
            },
            1024,
            "dynamic",
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 64,
                "rope_scaling": {"type": "yarn", "factor": 2},
            },
            None,
            "",
        ),
    ],
)
def test_rotations_that_depend_on_other_rows_are_refused(tmp_path, config, limit, kind):
    """The result of a row would depend on the longest row in its micro-batch."""
    place = base(tmp_path, **config)
    found = row_limit(config)
    assert (found and found.tokens) == limit
    if limit is not None:
        assert check_length(place, limit) == []
        with pytest.raises(ModelError, match=f"{limit + 1}: .*type {kind}.*set data.max_tokens={limit}$"):
            check_length(place, limit + 1)


def test_positions_that_count_the_scaling_already_are_not_scaled_twice():
    scaled = {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert rotary_reach({"model_type": "gemma3_text", **scaled}) == 131072
    assert rotary_reach({"model_type": "llama", **scaled}) == 8 * 131072


def test_a_rotary_type_that_changes_at_an_unknown_length_is_refused():
    config = {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(ModelError, match="type dynamic .*set max_position_embeddings"):
        row_limit(config)

"""Compute pieces of tokens with a model that DeepSpeed executes."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import PretrainedConfig

from fedspeed.engine.generation.cache import attention_masks
from fedspeed.engine.generation.pieces import Piece, read_in_parts
from fedspeed.engine.generation.segment_attention import SegmentAttention
from fedspeed.models.families.registry import FAMILIES


def compute_piece(
    execute: Callable,
    config: PretrainedConfig,
    piece: Piece,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
) -> np.ndarray:
    """Take a piece through the whole model; returns its values [k].

    Args:
        execute: DeepSpeed's engine. config: of the model. dtype: that the model computes in. rows: tokens
            whose logits are read at once.
    """
    # transformers computes the logits of given columns, of at least one.
    columns, at = np.unique(piece.wanted[1] if piece.count else [0], return_inverse=True)
    with SegmentAttention(piece.view).used(config):
        output = execute(
            input_ids=torch.from_numpy(piece.tokens).to(device),
            position_ids=torch.from_numpy(piece.positions).to(device),
            attention_mask=attention_masks(piece.view, FAMILIES[config.model_type], config, dtype, device),
            past_key_values=piece.view,
            use_cache=True,
            logits_to_keep=torch.from_numpy(columns).to(device),
        )
    if not piece.count:
        return np.zeros(0, dtype=np.int64)
    wanted = torch.from_numpy(piece.wanted[0]).to(device), torch.from_numpy(at).to(device)

    def logits_of(part: slice) -> torch.Tensor:
        return output.logits[wanted[0][part], wanted[1][part]]

    return read_in_parts(piece, logits_of, rows).cpu().numpy()

"""What happens to examples of more than data.max_tokens tokens: the policies of data.too_long."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Encoded, Example, Tokenizer
from fedspeed.errors import DataError


def shortened(examples: Sequence[Example], config: DataConfig, tokenizer: Tokenizer) -> Encoded:
    """Return the examples of one row within data.max_tokens.

    Args:
        examples: all whole. Only tokens up to the last one with a loss count as length.

    Raises:
        DataError: one is too long, and data.too_long=error.
    """
    limit = config.max_tokens
    longest = max(map(_length, examples))
    if longest > limit and config.too_long == "error":
        raise DataError(
            f"the row has {longest} tokens, more than data.max_tokens={limit}; raise data.max_tokens, "
            "shorten the row, or choose data.too_long=cut, drop or keep_end"
        )
    if longest > limit and config.too_long == "drop":
        return Encoded((), dropped=True)
    if longest > limit and config.too_long == "keep_end" and len(examples) == 1 and _has_prompt(examples[0]):
        kept = _end(examples[0], limit, tokenizer.bos_token_id)
        return Encoded((), dropped=True) if kept is None else Encoded((kept,), kept_end=True)
    within = tuple(example for example in (_cut(one, limit) for one in examples) if example.answer_tokens > 0)
    return Encoded(within, cut=longest > limit and bool(within))


def _length(example: Example) -> int:
    """Return the number of tokens up to the last one with a loss."""
    length = len(example.input_ids)
    if example.later_prompts and example.later_prompts[-1][1] == length:
        return example.later_prompts[-1][0]
    return length


def _has_prompt(example: Example) -> bool:
    """Return whether an example is one prompt with one answer."""
    inner = [span for span in example.later_prompts if span[1] < len(example.input_ids)]
    return example.labels_start > 1 and not inner


def _cut(example: Example, limit: int) -> Example:
    """Return the first `limit` tokens of an example."""
    ids = example.input_ids[:limit]
    gaps = tuple((start, min(end, limit)) for start, end in example.later_prompts if start < limit)
    return replace(example, input_ids=ids, later_prompts=gaps, cut=_length(example) > limit)


def _end(example: Example, limit: int, bos: int | None) -> Example | None:
    """Return the leading bos, the end of the prompt and the whole answer; None where they do not fit."""
    ids = example.input_ids[: _length(example)]
    start = example.labels_start
    leading = 1 if bos is not None and ids[0] == bos else 0
    room = limit - leading - (len(ids) - start)
    if room < 0 or room + leading < 1:
        return None
    return Example(np.concatenate([ids[:leading], ids[start - room :]]), leading + room)

"""An encoded row as people can read it: each token by itself, special tokens by name, prompt and trained part
apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedspeed.data.encode import IGNORED, Example, Tokenizer
from fedspeed.text_safety import visible


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of an example that all carry loss, or none does."""

    is_trained: bool
    tokens: tuple[str, ...]


def segments(example: Example, tokenizer: Tokenizer) -> list[Segment]:
    """Return the tokens of an example in segments, in order."""
    names = token_texts(example.input_ids.tolist(), tokenizer)
    trained = (example.labels != IGNORED).tolist()
    starts = [i for i in range(len(names)) if i == 0 or trained[i] != trained[i - 1]]
    return [
        Segment(trained[start], tuple(names[start:end]))
        for start, end in zip(starts, [*starts[1:], len(names)])
    ]


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token: of a special token its name, of a token within a character the name that
    the vocabulary has for it.
    """
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    texts = []
    for token, name in zip(ids, names):
        text = name if token in special else tokenizer.decode([token], skip_special_tokens=False)
        texts.append(visible(name if "\ufffd" in text else text))
    return texts

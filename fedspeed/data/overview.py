"""An overview of a split: what each client has, before anything is trained."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedspeed import activity
from fedspeed.data.base_template import PromptTemplate
from fedspeed.data.clients import ClientRows, count_rows, encode_row
from fedspeed.data.config import MAX_TOKENS, DataConfig
from fedspeed.data.copies import Copies, count_copies
from fedspeed.data.encode import Encoded, Tokenizer
from fedspeed.data.prompt_template import template_for
from fedspeed.data.row_counts import RowCounts, RowTable
from fedspeed.data.row_remarks import row_remarks
from fedspeed.data.shown_tokens import Segment, segments

NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class ClientOverview:
    """What one client has.

    Attributes:
        client: number of the client.
        train, held_out: numbers of rows, also of those that are not used.
        counts: of training and held-out rows together.
        categories: number of training rows by category, the most frequent one first.
        lengths: [rows] tokens of each training row before data.max_tokens shortens it, sorted.
        example: the first training row that is used, as the model sees it.
    """

    client: int
    train: int
    held_out: int
    counts: RowCounts
    categories: Mapping[str, int]
    lengths: np.ndarray
    example: tuple[Segment, ...]

    @property
    def quantiles(self) -> dict[str, int]:
        """Return the shortest, the median, the 95th percentile and the longest of the token lengths."""
        shares = {"min": 0.0, "median": 0.5, "95 %": 0.95, "max": 1.0}
        values = np.quantile(self.lengths, list(shares.values()), method="nearest")
        return {name: int(value) for name, value in zip(shares, values)}

    def to_json(self) -> dict[str, Any]:
        """Return the overview as a JSON object."""
        return {
            "client": self.client,
            "train_rows": self.train,
            "held_out_rows": self.held_out,
            **_counts_json(self.counts),
            "categories": dict(self.categories),
            "tokens": self.quantiles,
            "example": [{"trained": part.is_trained, "tokens": list(part.tokens)} for part in self.example],
        }


@dataclass(frozen=True)
class SplitOverview:
    """What all clients have.

    Attributes:
        template: name of the prompt template.
        notes: remarks on the rows, and warnings of what data.max_tokens removes.
    """

    clients: tuple[ClientOverview, ...]
    copies: Copies
    max_tokens: int
    template: str
    notes: tuple[str, ...]

    @property
    def total(self) -> RowCounts:
        """Return the counts over all clients."""
        return sum((client.counts for client in self.clients), RowCounts(0, 0, 0))

    def to_json(self) -> dict[str, Any]:
        """Return the overview as a JSON object."""
        return {
            "rows": self.total.rows,
            **_counts_json(self.total),
            "template": self.template,
            "max_tokens": self.max_tokens,
            "equal_rows_of_a_client": self.copies.within,
            "rows_at_several_clients": self.copies.shared,
            "held_out_rows_also_trained": self.copies.leaked,
            "held_out_rows": self.copies.held_out,
            "notes": list(self.notes),
            "clients": [client.to_json() for client in self.clients],
        }


def overview(
    config: DataConfig, clients: Sequence[ClientRows], tokenizer: Tokenizer, client: int | None = None
) -> SplitOverview:
    """Return the overview of a split.

    Args:
        clients: all of the split; equal rows are counted over all of them.
        client: number of the only one to describe; None: all of them.

    Raises:
        DataError: with data.too_long=error, a row is too long; or the template has no form for a row.
    """
    template = template_for(config, tokenizer)
    whole_rows = template_for(replace(config, max_tokens=MAX_TOKENS), tokenizer)
    described = [one for one in clients if client in (None, one.client)]
    views = tuple(_client_overview(one, tokenizer, template, whole_rows) for one in described)
    table = RowTable.of([view.counts for view in views], config.max_tokens)
    return SplitOverview(
        clients=views,
        copies=count_copies(clients),
        max_tokens=config.max_tokens,
        template=template.name,
        notes=(*table.warnings(), *row_remarks(config, clients)),
    )


def _client_overview(
    client: ClientRows, tokenizer: Tokenizer, template: PromptTemplate, whole_rows: PromptTemplate
) -> ClientOverview:
    """Return the overview of a client.

    Args:
        template: of the run. whole_rows: the same without data.max_tokens.
    """
    rows = activity.counted((*client.train, *client.val), "the encoding of rows", "row")
    encoded = [encode_row(row, template) for row in rows]
    whole = [
        encode_row(row, whole_rows) if _is_shortened(result) else result
        for row, result in zip(client.train, encoded)
    ]
    used = next((result for result in encoded[: len(client.train)] if result.examples), None)
    categories = Counter(row.category or NO_CATEGORY for row in client.train)
    return ClientOverview(
        client=client.client,
        train=len(client.train),
        held_out=len(client.val),
        counts=count_rows(encoded),
        categories=dict(categories.most_common()),
        lengths=np.sort([_length(result) for result in whole]),
        example=() if used is None else tuple(segments(used.examples[0], tokenizer)),
    )


def _is_shortened(encoded: Encoded) -> bool:
    return encoded.cut or encoded.kept_end or not encoded.examples


def _length(encoded: Encoded) -> int:
    return sum(len(example.input_ids) for example in encoded.examples)


def _counts_json(counts: RowCounts) -> dict[str, int]:
    return {
        "kept": counts.kept,
        "cut": counts.cut,
        "lost": counts.lost,
        "dropped": counts.dropped,
        "kept_end": counts.kept_end,
    }

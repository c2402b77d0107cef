"""The overview of a split as text for a terminal."""

from collections.abc import Mapping, Sequence

from fedspeed.data.overview import ClientOverview, SplitOverview
from fedspeed.data.row_counts import counts_text
from fedspeed.text_safety import quoted

MAX_CATEGORIES = 4  # of a client, by name
MAX_TOKENS = 400  # of a segment of the example: its first and last ones
# Columns, and those that are always there.
COUNTS = {"kept": "kept", "cut": "cut", "lost": "lost", "dropped": "dropped", "kept_end": "end kept"}
ALWAYS = ("kept", "cut", "lost")
BAR = "\N{BOX DRAWINGS LIGHT VERTICAL}"


def split_text(overview: SplitOverview) -> str:
    """Return a table of the clients, the remarks, and an example of the first client."""
    counts = [name for name in COUNTS if name in ALWAYS or getattr(overview.total, name)]
    header = ("client", "train", "held out", *(COUNTS[name] for name in counts))
    lines = [
        f"template {overview.template}, data.max_tokens={overview.max_tokens}; {counts_text(overview.total)}",
        *_table([
            (*header, *_quantile_names(overview), "categories"),
            *(_client_values(client, counts) for client in overview.clients),
        ]),
        _copies_text(overview),
        *(f"note: {note}" for note in overview.notes),
    ]
    for client in overview.clients[:1]:
        lines += ["", *_example_lines(client)]
    return "\n".join(lines)


def _quantile_names(overview: SplitOverview) -> list[str]:
    return [f"tokens {name}" if name == "min" else name for name in overview.clients[0].quantiles]


def _client_values(client: ClientOverview, counts: Sequence[str]) -> tuple[str, ...]:
    counted = (getattr(client.counts, name) for name in counts)
    numbers = (client.client, client.train, client.held_out, *counted)
    return (*map(str, numbers), *map(str, client.quantiles.values()), _categories_text(client.categories))


def _categories_text(categories: Mapping[str, int]) -> str:
    names = [f"{quoted(name, 40)} {count}" for name, count in categories.items()]
    more = len(names) - MAX_CATEGORIES
    return ", ".join(names[:MAX_CATEGORIES]) + (f" and {more} more" if more > 0 else "")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines; numbers are aligned to the right, the last column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([*(value.rjust(width) for value, width in zip(row[:-1], widths)), row[-1]]) for row in rows
    ]


def _copies_text(overview: SplitOverview) -> str:
    copies = overview.copies
    return (
        f"equal rows: {copies.within} within a client, {copies.shared} at several clients; "
        f"{copies.leaked} of {copies.held_out} held-out rows are also training rows"
    )


def _example_lines(client: ClientOverview) -> list[str]:
    """Return the example of a client: each segment with its tokens between bars."""
    if not client.example:
        return [f"client {client.client} has no row to show: data.max_tokens takes all of them"]
    count = sum(len(segment.tokens) for segment in client.example)
    lines = [f"example of client {client.client} ({count} tokens, one between two bars):"]
    for segment in client.example:
        kind = "trained" if segment.is_trained else "not trained"
        plural = "" if len(segment.tokens) == 1 else "s"
        lines.append(f"  {kind} ({len(segment.tokens)} token{plural}):")
        lines += [f"    {line}" for line in _tokens_text(segment.tokens).split("\n")]
    return lines


def _tokens_text(tokens: Sequence[str]) -> str:
    """Return tokens with bars between them; a line break within a token is shown and taken."""
    if len(tokens) > MAX_TOKENS:
        half = MAX_TOKENS // 2
        omitted = f" ... {len(tokens) - MAX_TOKENS} more tokens ... "
        tokens = [*tokens[:half], omitted, *tokens[-half:]]
    texts = [token.replace("\n", "\\n\n") for token in tokens]
    return BAR + BAR.join(texts) + BAR

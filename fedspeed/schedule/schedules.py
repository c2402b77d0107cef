"""In which order ranks compute: schedules of pipelines, as instruction streams. Pure."""

from collections.abc import Sequence
from itertools import chain

from fedspeed.schedule.instructions import (
    Backward,
    Bring,
    Decide,
    Embed,
    Forward,
    Head,
    Instruction,
    Load,
    Micro,
    Pipeline,
    Release,
    Stream,
    gives,
    with_transfers,
)

# More micro-batches under way than 1F1B has. Four clients with 3 micro-batches each on four stages take 48
# with 2, 46 with 3, and 45, the least, with 5.
SPARE = 5


def one_f_one_b(stages: int, clients: Sequence[int]) -> tuple[Stream, ...]:
    """A pipeline whose first stage embeds and whose last holds the labels: forwards until it is full, then
    one backward for each forward (PipeDream-flush; Narayanan et al., 2021). Stage s keeps at most stages - s
    micro-batches; idle is (stages - 1) / (micro-batches + stages - 1).

    Args:
        clients: of each micro-batch, whose it is.
    """
    pipeline = Pipeline(
        stages, tuple(range(stages)), tuple(Micro(client, 0, stages - 1) for client in clients)
    )
    return with_transfers(pipeline, [_alternating(pipeline, stage) for stage in range(stages)])


def _alternating(pipeline: Pipeline, stage: int) -> list[Instruction]:
    micros = len(pipeline.micros)
    warm = min(pipeline.ranks - 1 - stage, len(pipeline.micros))

    def forward(m: int) -> list[Instruction]:
        before = [Embed(m)] if pipeline.micros[m].embed == stage else []
        return before + [Forward(m, stage)] + ([Head(m)] if pipeline.micros[m].head == stage else [])

    steady = [forward(m + warm) + [Backward(m, stage)] for m in range(micros - warm)]
    return list(
        chain(
            *(forward(m) for m in range(warm)),
            *steady,
            (Backward(m, stage) for m in range(micros - warm, micros)),
        )
    )


def streamed(ranks: int, chunks: int, clients: Sequence[int]) -> tuple[Stream, ...]:
    """A pipeline over more blocks than its ranks hold: chunk k is loaded by rank k mod ranks, takes all
    micro-batches through, and is released; backwards again. So each rank loads its part of the base twice a
    step (the last chunk of all once), while the chunks of the other ranks are computed.

    Args:
        chunks: at least as many as ranks. clients: of each micro-batch, whose it is.
    """
    last = (chunks - 1) % ranks
    pipeline = Pipeline(
        ranks, tuple(k % ranks for k in range(chunks)), tuple(Micro(client, 0, last) for client in clients)
    )
    return with_transfers(pipeline, [_chunk_by_chunk(pipeline, rank) for rank in range(ranks)])


def layer_major(blocks: int, micros: int, *, lowest: int = 0, train: bool = True) -> Stream:
    """One rank takes all micro-batches of a step through one block, then through the next, and backwards
    again: each block is loaded twice a step, whatever the number of micro-batches. The idea of running all
    batches through a layer while it is loaded is FlexGen's (Sheng et al., 2023).

    The last block is loaded once, and each micro-batch takes it and the head forwards and backwards at once,
    so that it is not computed twice. Steps are apart.

    Args:
        blocks: each a chunk of its own. micros: none: only the loads, for the ranks that load together.
        lowest: the first block in which something trains, where the way back ends.
        train: whether there is a way back.
    """
    last = blocks - 1
    everyone = range(micros)
    order: list[Instruction] = [Load("embedding"), *map(Embed, everyone), Release("embedding")]
    for k in range(last):
        decide = [Decide(k)] if train and k == lowest else []
        order += [Load(k), *decide, *(Forward(m, k) for m in everyone), Release(k)]
    if not train:
        order += [Load(last), *(Forward(m, last) for m in everyone), Load("head"), *map(Head, everyone)]
        return (*order, Release("head"), Release(last))
    backwards = range(last - 1, lowest - 1, -1)
    order += [*map(Bring, backwards[:1]), Load(last), Load("head")]
    order += [work for m in everyone for work in (Forward(m, last), Head(m), Backward(m, last))]
    order += [Release("head"), Release(last)]
    for k in backwards:
        before = [Bring(k - 1)] if k > lowest else []
        order += [*before, Load(k), *(Backward(m, k) for m in everyone), Release(k)]
    return tuple(order)


def _chunk_by_chunk(pipeline: Pipeline, rank: int) -> list[Instruction]:
    everyone = range(len(pipeline.micros))
    last = len(pipeline.chunks) - 1
    mine = [k for k, owner in enumerate(pipeline.chunks) if owner == rank]
    order: list[Instruction] = [Embed(m) for m in everyone if pipeline.micros[m].embed == rank]
    for k in mine:
        order += [Load(k)]
        order += [
            work for m in everyone for work in ([Forward(m, k), Head(m)] if k == last else [Forward(m, k)])
        ]
        order += [Release(k)] if k != mine[-1] else []
    for k in reversed(mine):
        order += [Load(k)] if k != mine[-1] else []
        order += [*(Backward(m, k) for m in everyone), Release(k)]
    return order


def forward_only(pipeline: Pipeline, loads: bool = False) -> tuple[Stream, ...]:
    """All micro-batches through each chunk, and no way back. loads: whether chunks are loaded and
    released.
    """
    everyone = range(len(pipeline.micros))
    computed = []
    for rank in range(pipeline.ranks):
        order: list[Instruction] = [Embed(m) for m in everyone if pipeline.micros[m].embed == rank]
        for k in (k for k, holder in enumerate(pipeline.chunks) if holder == rank):
            order += [
                *([Load(k)] if loads else []),
                *(Forward(m, k) for m in everyone),
                *([Release(k)] if loads else []),
            ]
        computed.append(order + [Head(m) for m in everyone if pipeline.micros[m].head == rank])
    return with_transfers(pipeline, computed, train=False)


def shared(micros: Sequence[Micro], ranks: int) -> tuple[Stream, ...]:
    """All clients of a cluster in one pipeline, rank r holding chunk r. Each client's own rank embeds its
    micro-batches and holds their labels, so that neither leaves it; the clients' micro-batches take turns,
    and fill each other's bubbles.

    The order is that of list scheduling: whoever is free takes of what is ready a backward before a head, a
        head before a forward, a forward before an
    embedding, and the micro-batch that entered first. Stage s has at most ranks - s + SPARE micro-batches
    under way. Those whose owner is busy with another stage's work wait there. As many as in the first stage
    are embedded ahead of it by each owner.

    Args:
        micros: of all clients, in the order in which they enter; those of different clients taking turns.
    """
    pipeline = Pipeline(ranks, tuple(range(ranks)), tuple(micros))
    return with_transfers(pipeline, _listed(pipeline))


def taking_turns(micro_batches: Sequence[int]) -> list[tuple[int, int]]:
    """(client, number) of the clients' micro-batches, the first ones of all before the second ones."""
    return [
        (c, i)
        for i in range(max(micro_batches, default=0))
        for c, count in enumerate(micro_batches)
        if i < count
    ]


_URGENCY = {Backward: 0, Head: 1, Forward: 2, Embed: 3}
_COST = {Embed: 0.0, Forward: 1.0, Head: 0.25, Backward: 2.0}  # in times of a forward


def _listed(pipeline: Pipeline) -> list[list[Instruction]]:
    depth = len(pipeline.chunks)
    orders = [[] for _ in range(pipeline.ranks)]
    free = [0.0] * pipeline.ranks
    under_way = [0] * depth  # micro-batches between a chunk's forward and its backward
    embedded = [0] * pipeline.ranks  # by each rank, ahead of the first chunk
    ready: list[dict[Instruction, float]] = [
        {} for _ in range(pipeline.ranks)
    ]  # what could begin, and since when
    for m, micro in enumerate(pipeline.micros):
        ready[micro.embed][Embed(m)] = 0.0
    while any(ready):
        choices = [
            ((max(free[rank], since), _URGENCY[type(work)], work.micro, rank), work)
            for rank, works in enumerate(ready)
            for work, since in works.items()
            if not (isinstance(work, Forward) and under_way[work.chunk] >= depth - work.chunk + SPARE)
            and not (isinstance(work, Embed) and embedded[rank] >= depth + SPARE)
        ]
        (start, _, _, rank), work = min(choices, key=lambda choice: choice[0])
        del ready[rank][work]
        orders[rank].append(work)
        free[rank] = start + _COST[type(work)]
        if isinstance(work, Embed):
            embedded[rank] += 1
        elif isinstance(work, Forward):
            under_way[work.chunk] += 1
            embedded[pipeline.micros[work.micro].embed] -= work.chunk == 0
        elif isinstance(work, Backward):
            under_way[work.chunk] -= 1
        for kind, hop in gives(pipeline, work):
            ready[pipeline.receiver(work.micro, kind, hop)][_taker(pipeline, work.micro, kind, hop)] = free[
                rank
            ]
    return orders


def _taker(pipeline: Pipeline, micro: int, kind: str, hop: int) -> Instruction:
    if kind == "gradient":
        return Backward(micro, hop)
    return Head(micro) if hop == len(pipeline.chunks) else Forward(micro, hop)

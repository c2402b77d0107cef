"""The orders in which ranks compute: layer-major execution and schedules of pipelines, as instruction
streams. Pure.
"""

from collections.abc import Sequence
from itertools import chain

from fedspeed.schedule.instructions import (
    Backward,
    Decide,
    Embed,
    Forward,
    Head,
    Instruction,
    Kind,
    Load,
    Micro,
    MicroBatchInstruction,
    Pipeline,
    PrefetchInputs,
    Release,
    Stream,
    outputs_of,
    with_transfers,
)

# How many micro-batches may be in flight beyond those of 1F1B. Four clients with 3 micro-batches each on four
# stages take 48 forward times with 2, 46 with 3, and 45, the minimum, with 5.
SPARE = 5


def one_f_one_b(stages: int, clients: Sequence[int]) -> tuple[Stream, ...]:
    """Schedule a pipeline whose first stage embeds and whose last stage has the labels: forward passes until
    the pipeline is full, then one backward pass for each forward pass (PipeDream-flush; Narayanan et al.,
    2021).

    Stage s keeps the activations of at most stages - s micro-batches. The idle share of the time is
    (stages - 1) / (micro-batches + stages - 1).

    Args:
        clients: the client of each micro-batch.
    """
    pipeline = Pipeline(
        stages, tuple(range(stages)), tuple(Micro(client, 0, stages - 1) for client in clients)
    )
    return with_transfers(pipeline, [_alternating(pipeline, stage) for stage in range(stages)])


def _alternating(pipeline: Pipeline, stage: int) -> list[Instruction]:
    """Return a stage's computations in 1F1B order."""
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
    """Schedule a pipeline over more blocks than fit on its ranks.

    Rank k mod ranks loads chunk k, computes all micro-batches with it and releases it; the same backwards. So
    each rank loads its share of the base twice a step (the last chunk once), while the other ranks compute.

    Args:
        chunks: at least as many as ranks.
        clients: the client of each micro-batch.
    """
    last = (chunks - 1) % ranks
    pipeline = Pipeline(
        ranks, tuple(k % ranks for k in range(chunks)), tuple(Micro(client, 0, last) for client in clients)
    )
    return with_transfers(pipeline, [_chunk_by_chunk(pipeline, rank) for rank in range(ranks)])


def layer_major(blocks: int, micros: int, *, lowest: int = 0, train: bool = True) -> Stream:
    """Schedule one rank that computes all micro-batches of a step in one block, then in the next, and the
    same backwards.

    So each block is loaded twice a step, whatever the number of micro-batches. Computing all batches with a
    layer while it is loaded is the idea of FlexGen (Sheng et al., 2023). The last block is loaded once: each
    micro-batch passes it and the head forwards and backwards at once, so that it is not recomputed. Optimizer
    steps are not part of the stream.

    Args:
        blocks: their number; each is a chunk.
        micros: number of micro-batches; with 0 the stream only loads, for ranks that load collectively.
        lowest: the first block that trains, where the backward pass ends.
        train: whether there is a backward pass.
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
    order += [*map(PrefetchInputs, backwards[:1]), Load(last), Load("head")]
    order += [work for m in everyone for work in (Forward(m, last), Head(m), Backward(m, last))]
    order += [Release("head"), Release(last)]
    for k in backwards:
        before = [PrefetchInputs(k - 1)] if k > lowest else []
        order += [*before, Load(k), *(Backward(m, k) for m in everyone), Release(k)]
    return tuple(order)


def _chunk_by_chunk(pipeline: Pipeline, rank: int) -> list[Instruction]:
    everyone = range(len(pipeline.micros))
    last = len(pipeline.chunks) - 1
    own_chunks = [k for k, owner in enumerate(pipeline.chunks) if owner == rank]
    order: list[Instruction] = [Embed(m) for m in everyone if pipeline.micros[m].embed == rank]
    for k in own_chunks:
        order += [Load(k)]
        order += [
            work for m in everyone for work in ([Forward(m, k), Head(m)] if k == last else [Forward(m, k)])
        ]
        order += [Release(k)] if k != own_chunks[-1] else []
    for k in reversed(own_chunks):
        order += [Load(k)] if k != own_chunks[-1] else []
        order += [*(Backward(m, k) for m in everyone), Release(k)]
    return order


def forward_only(pipeline: Pipeline, loads: bool = False) -> tuple[Stream, ...]:
    """Schedule the forward passes of all micro-batches through each chunk, without a backward pass.

    Args:
        loads: whether chunks are loaded and released.
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
    """Schedule all clients of a cluster in one pipeline, in which rank r has chunk r.

    A client's own rank embeds its micro-batches and has their labels, so that neither tokens nor labels leave
    it. The clients' micro-batches take turns and fill each other's bubbles.

    The order is that of list scheduling: a free rank takes, among the instructions that are ready, a backward
    before a head, a head before a forward and a forward before an embedding, and among these the micro-batch
    that entered first. Stage s has at most ranks - s + SPARE micro-batches in flight, and each rank embeds at
    most as many ahead of the first stage as that stage may have in flight.

    Args:
        micros: of all clients, in the order in which they enter; those of different clients take turns.
    """
    pipeline = Pipeline(ranks, tuple(range(ranks)), tuple(micros))
    return with_transfers(pipeline, _list_schedule(pipeline))


def taking_turns(micro_batches: Sequence[int]) -> list[tuple[int, int]]:
    """Return (client, number) of all micro-batches: the first of every client, then the second of every
    client.
    """
    return [
        (c, i)
        for i in range(max(micro_batches, default=0))
        for c, count in enumerate(micro_batches)
        if i < count
    ]


_URGENCY = {Backward: 0, Head: 1, Forward: 2, Embed: 3}
_COST = {Embed: 0.0, Forward: 1.0, Head: 0.25, Backward: 2.0}  # relative to a forward pass


def _list_schedule(pipeline: Pipeline) -> list[list[Instruction]]:
    depth = len(pipeline.chunks)
    orders: list[list[Instruction]] = [[] for _ in range(pipeline.ranks)]
    free = [0.0] * pipeline.ranks
    in_flight = [0] * depth  # by chunk, micro-batches between its forward and backward pass
    embedded = [0] * pipeline.ranks  # by rank, micro-batches embedded ahead of the first chunk
    # By rank, the instructions that could begin, and since when.
    ready: list[dict[MicroBatchInstruction, float]] = [{} for _ in range(pipeline.ranks)]
    for m, micro in enumerate(pipeline.micros):
        ready[micro.embed][Embed(m)] = 0.0
    while any(ready):
        choices = [
            ((max(free[rank], since), _URGENCY[type(work)], work.micro, rank), work)
            for rank, works in enumerate(ready)
            for work, since in works.items()
            if not (isinstance(work, Forward) and in_flight[work.chunk] >= depth - work.chunk + SPARE)
            and not (isinstance(work, Embed) and embedded[rank] >= depth + SPARE)
        ]
        (start, _, _, rank), work = min(choices, key=lambda choice: choice[0])
        del ready[rank][work]
        orders[rank].append(work)
        free[rank] = start + _COST[type(work)]
        if isinstance(work, Embed):
            embedded[rank] += 1
        elif isinstance(work, Forward):
            in_flight[work.chunk] += 1
            embedded[pipeline.micros[work.micro].embed] -= work.chunk == 0
        elif isinstance(work, Backward):
            in_flight[work.chunk] -= 1
        for kind, hop in outputs_of(pipeline, work):
            receiver = pipeline.receiver(work.micro, kind, hop)
            ready[receiver][_next_instruction(pipeline, work.micro, kind, hop)] = free[rank]
    return orders


def _next_instruction(pipeline: Pipeline, micro: int, kind: Kind, hop: int) -> MicroBatchInstruction:
    """Return the instruction that needs an activation or a gradient."""
    if kind == "gradient":
        return Backward(micro, hop)
    return Head(micro) if hop == len(pipeline.chunks) else Forward(micro, hop)

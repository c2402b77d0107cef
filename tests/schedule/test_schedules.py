"""Schedules of pipelines without processes: orders, transfers, and their time in a simulation."""

from collections import Counter
from dataclasses import dataclass

import pytest

from fedspeed.planner.pipeline.execute import Deadlock, execute
from fedspeed.schedule.instructions import (
    Backward,
    Decide,
    Embed,
    Forward,
    Head,
    Load,
    Micro,
    Pipeline,
    PrefetchInputs,
    Receive,
    Release,
    Send,
    Step,
)
from fedspeed.schedule.loads import loads_of, step_order
from fedspeed.schedule.schedules import (
    SPARE,
    forward_only,
    layer_major,
    one_f_one_b,
    shared,
    streamed,
    taking_turns,
)


@dataclass
class Even:
    """Times of instructions: 1 s for a forward, 2 s for a backward and, by default, 0 s for the rest."""

    head: float = 0.0
    wire: float = 0.0
    loading: float = 0.0
    slots: int = 2

    def compute(self, work, rank):
        return {Forward: 1.0, Backward: 2.0, Head: self.head}.get(type(work), 0.0)

    def transfer(self, work, rank):
        return self.wire, (rank,)

    def load(self, chunk, rank):
        return self.loading


def together_in(owners, micro_batches, ranks):
    return shared([Micro(c, owners[c], owners[c]) for c, _ in taking_turns(micro_batches)], ranks)


SHAPES = [(2, 1), (2, 4), (3, 2), (3, 7), (4, 3), (4, 8)]
ALL = (
    [one_f_one_b(p, [0] * m) for p, m in SHAPES]
    + [streamed(p, 3 * p, [0, 1] * m) for p, m in SHAPES]
    + [streamed(3, 5, [0] * 4), streamed(1, 4, [0] * 3)]
    + [together_in(tuple(range(p)), (m,) * p, p) for p, m in SHAPES]
    + [together_in((0, 3, 1), (3, 1, 2), 4)]
    + [together_in((1,), (5,), 2), together_in((0, 0, 1), (2, 2, 1), 2)]
)


@pytest.mark.parametrize("streams", ALL)
def test_every_micro_batch_passes_every_chunk_once_each_way(streams):
    counts = Counter(
        work for stream in streams for work in stream if not isinstance(work, Step | Load | Release)
    )
    assert set(counts.values()) == {1}
    micros = {work.micro for work in counts if isinstance(work, Embed)}
    chunks = {work.chunk for work in counts if isinstance(work, Forward)}
    for kind in (Forward, Backward):
        assert {(w.micro, w.chunk) for w in counts if type(w) is kind} == {
            (m, k) for m in micros for k in chunks
        }
    assert {w.micro for w in counts if isinstance(w, Head)} == micros


@pytest.mark.parametrize("streams", ALL)
def test_every_message_is_sent_once_and_received_once(streams):
    sent = {
        (rank, w.to, w.kind, w.hop, w.micro)
        for rank, stream in enumerate(streams)
        for w in stream
        if isinstance(w, Send)
    }
    received = {
        (w.source, rank, w.kind, w.hop, w.micro)
        for rank, stream in enumerate(streams)
        for w in stream
        if isinstance(w, Receive)
    }
    assert sent == received
    execute(streams, Even(wire=0.5))  # no deadlock


@pytest.mark.parametrize("streams", ALL)
def test_a_rank_steps_each_client_once_behind_all_its_gradients(streams):
    for stream in streams:
        steps = [w.client for w in stream if isinstance(w, Step)]
        assert (
            steps == sorted(set(steps))
            and steps == [w.client for w in streams[0] if isinstance(w, Step)] != []
        )
        assert all(isinstance(w, Step) for w in stream[-len(steps) :])


@pytest.mark.parametrize("stages,micro_batches", SHAPES)
def test_1f1b_is_deepspeeds_order_and_costs_what_the_formula_says(stages, micro_batches):
    from deepspeed.runtime.pipe import schedule

    streams = one_f_one_b(stages, [0] * micro_batches)
    for stage, stream in enumerate(streams):
        theirs = schedule.TrainSchedule(micro_batches, stages, stage)
        order = []
        for step in theirs:
            order += [
                type(cmd) for cmd in step if isinstance(cmd, schedule.ForwardPass | schedule.BackwardPass)
            ]
        ours = [
            schedule.ForwardPass if isinstance(w, Forward) else schedule.BackwardPass
            for w in stream
            if isinstance(w, Forward | Backward)
        ]
        assert ours == order
        held = 0
        most = 0
        for work in stream:
            held += isinstance(work, Forward) - isinstance(work, Backward)
            most = max(most, held)
        assert most == min(stages - stage, micro_batches)
    assert execute(streams, Even()).bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@pytest.mark.parametrize("owners,ranks,loads", [((0, 1, 2), 3, False), ((1, 1), 3, True), ((0,), 1, False)])
def test_the_way_there_alone(owners, ranks, loads):
    pipeline = Pipeline(
        ranks, tuple(k % ranks for k in range(2 * ranks)), tuple(Micro(c, o, o) for c, o in enumerate(owners))
    )
    streams = forward_only(pipeline, loads)
    line = execute(streams, Even(wire=0.1))
    assert line.seconds > 0 and {w.micro for stream in streams for w in stream if isinstance(w, Head)} == set(
        range(len(owners))
    )
    assert not any(
        isinstance(w, Backward | Step) or getattr(w, "kind", "") == "gradient"
        for stream in streams
        for w in stream
    )


def test_a_message_that_nobody_sends_is_a_deadlock_that_is_named():
    streams = list(one_f_one_b(2, [0, 0]))
    streams[0] = tuple(w for w in streams[0] if not isinstance(w, Send))
    with pytest.raises(
        Deadlock, match=r"rank 0 waits in Receive.*rank 1 waits in Receive\(micro=0, kind=activation"
    ):
        execute(streams, Even())


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_four_clients_fill_each_others_bubbles(micro_batches):
    together = execute(together_in((0, 1, 2, 3), (micro_batches,) * 4, 4), Even())
    alone = execute(one_f_one_b(4, [0] * micro_batches), Even())
    assert 4 * alone.seconds / together.seconds >= 1.5


def test_a_stage_never_holds_more_than_it_was_to(ranks=4):
    for stage, stream in enumerate(together_in((0, 1, 2, 3), (6,) * 4, ranks)):
        held = 0
        most = 0
        for work in stream:
            held += isinstance(work, Forward) - isinstance(work, Backward)
            most = max(most, held)
        assert most <= ranks - stage + SPARE


def test_labels_and_token_ids_stay_with_their_owner():
    for rank, stream in enumerate(together_in((2, 0, 3), (2, 2, 2), 4)):
        owned = {2: 0, 0: 1, 3: 2}.get(rank)
        assert {w.micro % 3 for w in stream if isinstance(w, Embed | Head)} == (
            {owned} if owned is not None else set()
        )


@pytest.mark.parametrize("ranks,chunks", [(1, 4), (2, 6), (3, 5)])
def test_streamed_chunks_are_loaded_twice_but_for_each_ranks_last(ranks, chunks):
    streams = streamed(ranks, chunks, [0] * 4)
    for rank, stream in enumerate(streams):
        loads = Counter(w.chunk for w in stream if isinstance(w, Load))
        mine = [k for k in range(chunks) if k % ranks == rank]
        assert loads == {k: 2 - (k == mine[-1]) for k in mine} and loads == Counter(
            w.chunk for w in stream if isinstance(w, Release)
        )
        held: set[int] = set()
        for work in stream:
            if isinstance(work, Load):
                held.add(work.chunk)
            elif isinstance(work, Release):
                held.remove(work.chunk)
            elif isinstance(work, Forward | Backward):
                assert held == {work.chunk}


@pytest.mark.parametrize("blocks,lowest", [(1, 0), (4, 0), (5, 2), (3, 2)])
def test_layer_major_visits_blocks_as_the_planner_counts_and_computes_the_last_one_at_once(blocks, lowest):
    last = blocks - 1
    for micros in (0, 3):
        stream = layer_major(blocks, micros, lowest=lowest)
        at = {work: i for i, work in enumerate(stream)}
        loads = loads_of(stream)
        assert loads[0] == "embedding" and loads.pop(0) and loads.pop(blocks) == "head"
        assert loads == step_order(blocks, lowest), "and no load depends on the micro-batches"
        assert Counter(map(type, stream)) == +Counter({
            Embed: micros,
            Forward: micros * blocks,
            Head: micros,
            Backward: micros * (blocks - lowest),
            PrefetchInputs: last - lowest,
            Load: len(loads) + 2,
            Release: len(loads) + 2,
            Decide: int(lowest < last),
        })
        for m in range(micros):
            assert stream[at[Forward(m, last)] :][:3] == (Forward(m, last), Head(m), Backward(m, last))
        for k in range(lowest, last):
            assert at[PrefetchInputs(k)] < [i for i, work in enumerate(stream) if work == Load(k)][1], (
                "before its block"
            )
            assert [w.chunk for w in stream[at[PrefetchInputs(k)] :] if isinstance(w, Load)][0] == k + 1, (
                "one block ahead"
            )
    forwards = layer_major(blocks, 3, lowest=lowest, train=False)
    assert loads_of(forwards) == ["embedding", *range(blocks), "head"]
    assert {type(work) for work in forwards} == {Embed, Forward, Head, Load, Release}
    held: set = set()
    for work in (*stream, *forwards):
        if isinstance(work, Load):
            held.add(work.chunk)
        elif isinstance(work, Release):
            held.remove(work.chunk)
        elif isinstance(work, Forward | Backward):
            assert work.chunk in held
        elif isinstance(work, Embed | Head):
            assert {Embed: "embedding", Head: "head"}[type(work)] in held
    assert not held


def test_loads_hide_behind_the_other_micro_batches():
    """With two ranks, six chunks and eight micro-batches, a chunk takes 8 s forwards and loads in 6 s."""
    hidden, waited = (execute(streamed(2, 6, [0] * 8), Even(loading=s)) for s in (6.0, 24.0))
    plain = execute(streamed(2, 6, [0] * 8), Even())
    assert hidden.seconds <= plain.seconds + 2 * 6.0 and waited.seconds > 1.5 * plain.seconds
    assert execute(streamed(2, 6, [0] * 8), Even(loading=6.0, slots=1)).seconds > hidden.seconds + 20

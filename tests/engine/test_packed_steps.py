"""A step of packed rows has the loss and the gradient of the same rows without packing: for every family, by
every kind of engine.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedspeed.data.batches import StepBatches, collate, collate_packed
from fedspeed.data.config import TrainConfig
from fedspeed.data.encode import Example
from fedspeed.engine.config import EngineConfig
from fedspeed.engine.pipeline.headers import TRAIN, MicroBatchHeader, PassHeader
from tests.engine.engines import engine, in_world
from tests.engine.families import PIPELINE, RATE, adapter, drawn_state
from tests.engine.family_bases import VOCABULARY, WRITTEN, write_base
from tests.processes import run_clusters
from tests.tiny import random_step

TOLERANCE = 1e-6
SEEN = 1e-3  # the smallest difference that rounding cannot explain
_RNG = np.random.default_rng(3)
# (tokens, first token with loss) of rows, most of them longer than the sliding windows.
EXAMPLES = [
    Example(_RNG.integers(3, VOCABULARY, length).astype(np.int32), start)
    for length, start in ((5, 1), (9, 0), (7, 3), (12, 4), (6, 0), (4, 2), (11, 5), (8, 0))
]
PACKED = (((0, 1, 2), (3, 4)), ((5, 6), (7,)))  # rows of each sequence of each micro-batch
STREAMED = ("ram", "nvme", "resident")


def step_of(packed: bool, rows=EXAMPLES) -> StepBatches:
    """Return a step of two micro-batches of these rows."""
    micro = [
        collate_packed([[rows[i] for i in sequence] for sequence in sequences], 0, 32)
        if packed
        else collate([rows[i] for sequence in sequences for i in sequence], 0, 32)
        for sequences in PACKED
    ]
    return StepBatches(micro, sum(row.answer_tokens for row in rows))


def trained(client_engine, step: StepBatches, slot: int = 0) -> tuple[float, np.ndarray]:
    """Return the summed loss of a step, and the gradient of its mean loss."""
    start = drawn_state({name: tuple(value.shape) for name, value in client_engine.state().items()})
    client_engine.load(start)
    loss = client_engine.train_step([step], RATE)[0].loss
    end = client_engine.state()
    gradient = [(start[name] - end[name]).detach().numpy().ravel() / RATE for name in sorted(start)]
    return loss, np.concatenate(gradient)


def difference(found: tuple[float, np.ndarray], expected: tuple[float, np.ndarray]) -> float:
    """Return the larger of the relative differences of loss and gradient. In a pipeline only one rank knows
    the loss, and the others say 0.
    """
    gradient = np.abs(found[1] - expected[1]).max() / np.abs(expected[1]).max()
    loss = abs(found[0] - expected[0]) / (expected[0] or 1.0)
    return float(max(loss, gradient))


def compared(client_engine) -> tuple[float, float]:
    """Compare a packed step with the same rows without packing; returns the difference, and the one there
    would be if rows attended to those before them.
    """
    expected = trained(client_engine, step_of(False))
    found = trained(client_engine, step_of(True))
    return difference(found, expected), difference(without_boundaries(client_engine), expected)


def without_boundaries(client_engine) -> tuple[float, np.ndarray]:
    """Return what a packed step computes where transformers finds no boundaries between rows."""
    import transformers.masking_utils as masks

    from fedspeed.engine.compute import micro_batches

    whole = masks.find_packed_sequence_indices, micro_batches.packed
    masks.find_packed_sequence_indices = lambda position_ids: None
    micro_batches.packed = micro_batches.not_packed
    try:
        return trained(client_engine, step_of(True))
    finally:
        masks.find_packed_sequence_indices, micro_batches.packed = whole


def built(base, kind, clients=((0,),), **options):
    """Build an engine as it is compared here."""
    sgd = TrainConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0)
    return engine(
        base, kind, clients=clients, adapter=adapter("all-linear"), train=sgd, join=False, micro=2, **options
    )


def of_kinds(rank, kinds, folder):
    """Compare families by kinds of engines: {(family, kind): (the difference, that without boundaries)}."""
    found = {}
    for family, some in kinds.items():
        base = write_base(family, folder / family)
        for kind in some:
            with built(base, kind, nvme=folder) as client_engine:
                found[family, kind] = compared(client_engine)
                client_engine.close()
    return found


def check(found) -> None:
    """Assert that packing makes no difference, and that it would where rows saw each other."""
    assert {case: same for case, (same, _) in found.items() if not same < TOLERANCE} == {}
    assert {case: wrong for case, (_, wrong) in found.items() if not wrong > SEEN} == {}


def test_a_packed_step_is_that_of_its_rows_in_every_family(tmp_path):
    kinds = {family: ("zero0", STREAMED[i % len(STREAMED)]) for i, family in enumerate(WRITTEN)}
    [found] = run_clusters([1], in_world, of_kinds, kinds, tmp_path)
    check(found)


@pytest.mark.slow
def test_a_packed_step_is_that_of_its_rows_in_every_family_by_every_engine(tmp_path):
    kinds = dict.fromkeys(WRITTEN, ("zero0", "zero3", *STREAMED))
    [found] = run_clusters([1], in_world, of_kinds, kinds, tmp_path)
    check(found)


def of_pipeline(rank, scope, families, folder):
    """Compare in a pipeline of two ranks: one client's, or that of a cluster of two clients."""
    from deepspeed import comm as dist

    clients = ((0, 1),) if scope == "client" else ((0,), (1,))
    options = PIPELINE if scope == "client" else EngineConfig(pipeline="cluster")
    found = {}
    for family in families:
        base = folder / family
        if rank == 0:
            write_base(family, base)
        dist.barrier()
        with built(str(base), "resident", clients, options=options) as client_engine:
            found[family, scope] = compared(client_engine)
            client_engine.close()
    return found


@pytest.mark.parametrize("scope", [pytest.param("client", marks=pytest.mark.slow), "cluster"])
def test_a_packed_step_is_that_of_its_rows_in_a_pipeline(tmp_path, scope):
    families = ("gemma3_text", "gpt2")
    for found in run_clusters([2], in_world, of_pipeline, scope, families, tmp_path):
        check(found)


def test_stages_without_the_data_know_which_rows_share_a_sequence():
    batches = (*step_of(True).micro, *step_of(False).micro)
    sent = PassHeader(TRAIN, micros=tuple(MicroBatchHeader.of(batch, 1, 2, 3) for batch in batches))
    for batch, header in zip(batches, PassHeader.read(sent.integers()).micros, strict=True):
        other = header.batch()
        assert np.array_equal(other.attention_mask, batch.attention_mask)
        assert (other.position_ids is None) == (batch.position_ids is None)
        if batch.position_ids is not None:
            assert np.array_equal(other.position_ids, batch.position_ids)


def evaluated(rank, folder):
    """Return by kind what evaluating packed rows, and then others, ends in."""
    messages = {}
    packed = step_of(True).micro[0]
    base = write_base("llama", folder / "base")
    for kind in ("zero0", "resident"):
        messages[kind] = []
        with built(base, kind) as client_engine:
            for batch in (packed, replace(packed, position_ids=None), random_step(0, 2, 1).micro[0]):
                try:
                    client_engine.evaluate([[batch]])
                    messages[kind].append("")
                except AssertionError as error:
                    messages[kind].append(str(error))
    return messages


def test_packed_rows_are_never_counted_as_one(tmp_path):
    [found] = run_clusters([1], in_world, evaluated, tmp_path)
    refused = ["rows that are counted must not be packed", "", ""]
    assert found == {"zero0": refused, "resident": refused}

"""Compare the model divided over ranks with the same model in one process."""

import numpy as np
import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.engine.pipeline.transfers import POSTED_RECEIVES
from fedspeed.models.config import AdapterConfig
from tests.engine.engines import engine
from tests.engine.small_models import DETERMINED, LORA, stirred
from tests.processes import run_clusters
from tests.tiny import random_step

RATE = 0.1


def trained(rank, base, kind, options, ranks, *, dtype="fp32", client_slots=1, clip=0.0, nvme="unused"):
    steps = [random_step(3 + client_slot, 2, 3) for client_slot in range(client_slots)]
    steps[0].micro[1].attention_mask[0, -5:] = 0  # padding: the blocks' masks differ between micro-batches
    steps[0].micro[1].labels[0, -5:] = -100
    with engine(
        base,
        kind,
        dtype,
        clients=(tuple(range(ranks)),),
        adapter=LORA,
        train=DETERMINED,
        options=options,
        client_slots=client_slots,
        gradient_clipping=clip,
        nvme=nvme,
    ) as client_engine:
        start = stirred(client_engine.state())
        client_engine.load(start)
        before = client_engine.evaluate([steps[0].micro, steps[0].micro[:1]])
        for client_slot in range(client_slots):
            client_engine.load(start, slot=client_slot, seed=client_slot)
        losses = [[s.loss for s in client_engine.train_step(steps, RATE)] for _ in range(3)]
        ends = [
            {n: v.detach().numpy() for n, v in client_engine.state(client_slot).items()}
            for client_slot in range(client_slots)
        ]
        return before, losses, ends, client_engine.take_loaded()


def same(found, expected, tolerance=1e-5):
    before, losses, ends, _ = found
    expected_before, expected_losses, expected_ends, _ = expected
    for sums, reference in zip(before, expected_before, strict=True):
        assert (sums.tokens, sums.exact, sums.rows) == (reference.tokens, reference.exact, reference.rows)
        assert sums.loss == pytest.approx(reference.loss, rel=tolerance)
    assert np.abs(np.array(losses) / np.array(expected_losses) - 1).max() < tolerance
    for end, reference in zip(ends, expected_ends, strict=True):
        assert end.keys() == reference.keys()
        assert max(np.abs(end[n] - reference[n]).max() for n in end) < 20 * tolerance


@pytest.mark.parametrize(
    "family,ranks,cuts",
    [
        ("llama", 2, "auto"),
        ("llama", 3, (1, 2)),
        ("llama", 4, "auto"),
        ("qwen2", 2, (3,)),
        ("gpt2", 3, (2, 3)),
    ],
)
def test_stages_train_as_one_process(bases, family, ranks, cuts):
    found = run_clusters(
        [ranks], trained, bases[family], "resident", EngineConfig(pipeline="client", cuts=cuts), ranks
    )
    [expected] = run_clusters([1], trained, bases[family], "resident", EngineConfig(), 1)
    same(found[0], expected)
    for other in found[1:]:
        assert all(
            np.array_equal(other[2][0][n], found[0][2][0][n]) for n in found[0][2][0]
        )  # every rank returns the whole state


@pytest.mark.parametrize(
    "kind,options",
    [
        ("ram", {"block_slots": 2}),
        pytest.param("nvme", {"block_slots": 4}, marks=pytest.mark.slow),
        pytest.param("resident", {"activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_chunks_that_are_loaded_or_computed_again_change_nothing(bases, tmp_path, kind, options):
    options = EngineConfig(pipeline="client", **options)
    found = run_clusters(
        [2], trained, bases["llama"], kind, options, 2, dtype="fp32", client_slots=1, clip=0.0, nvme=tmp_path
    )
    [expected] = run_clusters([1], trained, bases["llama"], "resident", EngineConfig(), 1)
    same(found[0], expected)
    if kind != "resident":
        assert all(f[3] > 0 for f in found)


@pytest.mark.parametrize(
    "dtype,clip,client_slots",
    [
        ("fp32", 0.05, 1),
        pytest.param("fp32", 0.0, 2, marks=pytest.mark.slow),
        pytest.param("bf16", 0.05, 1, marks=pytest.mark.slow),
        ("fp16", 0.05, 2),
    ],
)
def test_norms_scales_and_client_slots_are_those_of_the_whole_pipeline(bases, dtype, clip, client_slots):
    """Gradients are clipped by the norm over all stages, fp16 has one loss scale on all ranks, and clients
    that share the ranks take turns.
    """
    found = run_clusters(
        [3],
        trained,
        bases["llama"],
        "resident",
        EngineConfig(pipeline="client", cuts=(1, 2)),
        3,
        dtype=dtype,
        client_slots=client_slots,
        clip=clip,
    )
    [expected] = run_clusters(
        [1],
        trained,
        bases["llama"],
        "resident",
        EngineConfig(),
        1,
        dtype=dtype,
        client_slots=client_slots,
        clip=clip,
    )
    same(found[0], expected, 1e-5 if dtype == "fp32" else 2e-2)


def clipped(rank, base, dtype, options, ranks):
    """Return the length of one step of plain SGD with rate 1, which is the norm that gradients were clipped
    to.
    """
    with engine(
        base,
        "resident",
        dtype,
        clients=(tuple(range(ranks)),),
        adapter=LORA,
        train=TrainConfig(optimizer="sgd"),
        options=options,
        gradient_clipping=0.05,
    ) as client_engine:
        start = stirred(client_engine.state())
        client_engine.load(start)
        before = client_engine.state()  # rounded to the type
        client_engine.train_step([random_step(3, 2, 3)], 1.0)
        kept = client_engine.optimizer_state()
        assert all(key.endswith("momentum_buffer") for key in kept)  # plain SGD has no state, on any stage
        return float(sum(((client_engine.state()[n] - before[n]).double() ** 2).sum() for n in before) ** 0.5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_norm_that_is_clipped_is_that_of_all_stages(bases, dtype):
    for went in run_clusters(
        [3], clipped, bases["llama"], dtype, EngineConfig(pipeline="client", cuts=(1, 2)), 3
    ):
        assert went == pytest.approx(0.05, rel=1e-3 if dtype == "fp32" else 3e-2)


def crowded(rank, base, kind, scope, micros):
    """Return the losses of one step and one evaluation with more micro-batches than receives are posted
    ahead.
    """
    steps = [random_step(5 + client_slot, 1, micros, length=8) for client_slot in range(2)]
    ranks = 2 if scope != "none" else 1
    clients = ((0,), (1,)) if scope == "cluster" else (tuple(range(ranks)),)
    with engine(
        base,
        kind,
        clients=clients,
        adapter=LORA,
        options=EngineConfig(pipeline=scope),
        client_slots=1,
        micro=1,
    ) as client_engine:
        start = stirred(client_engine.state())
        client_engine.load(start)
        work = steps[rank] if scope == "cluster" else steps[0]
        with client_engine.matched_passes(1, backward=False):
            before = client_engine.evaluate([work.micro])[0]
        with client_engine.matched_passes(client_engine.train_passes(1, 1, micros), backward=True):
            client_engine.load(start)
            loss = client_engine.train_step([work], 0.01)[0].loss
            client_engine.state()
        return before.loss, loss


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,scope,micros",
    [
        ("resident", "cluster", 10 * POSTED_RECEIVES),
        *(
            (kind, scope, 150)
            for kind, scope in (("resident", "cluster"), ("resident", "client"), ("ram", "client"))
        ),
    ],
)
def test_a_crowd_of_micro_batches_goes_through(bases, kind, scope, micros):
    """No rank may wait for buffer space on a rank that waits for it."""
    found = run_clusters([2], crowded, bases["llama"], kind, scope, micros)
    [expected] = run_clusters([1], crowded, bases["llama"], "resident", "none", micros)
    assert found[0] == pytest.approx(expected, rel=1e-5)


def differing_cuts(rank, base):
    options = EngineConfig(pipeline="client", cuts=((1,), (3,))[rank])
    return trained(rank, base, "resident", options, 2)


def test_the_first_ranks_cuts_hold_for_all(bases):
    """Each rank may have computed other cuts from its own measurement."""
    [expected] = run_clusters([1], trained, bases["llama"], "resident", EngineConfig(), 1)
    same(run_clusters([2], differing_cuts, bases["llama"])[0], expected)


def refused(rank, base):
    from fedspeed.errors import FedSpeedError

    with (
        pytest.raises(FedSpeedError, match="nothing trains in the blocks of stage 1"),
        engine(
            base,
            "resident",
            clients=((0, 1),),
            adapter=AdapterConfig(targets=("layers.0.self_attn.q_proj",)),
            options=EngineConfig(pipeline="client"),
        ),
    ):
        pass


def test_a_stage_that_trains_nothing_is_refused(bases):
    run_clusters([2], refused, bases["llama"])


def test_a_stage_reads_its_own_weights_only(bases, tmp_path):
    stored = run_clusters([3], stored_names, bases["llama"], tmp_path)
    [whole] = run_clusters([1], stored_names, bases["llama"], tmp_path)
    assert all(set(part) < set(whole) for part in stored)
    for b in range(4):
        holders = [rank for rank, part in enumerate(stored) if any(f"layers.{b}." in name for name in part)]
        assert holders == [{0: 0, 1: 1, 2: 2, 3: 2}[b]]
    assert [any("embed_tokens" in name for name in part) for part in stored] == [True, False, False]
    assert [any("lm_head" in name for name in part) for part in stored] == [False, False, True]


def stored_names(rank, base, nvme):
    """Return the names of the frozen parameters on this rank that are not on the meta device. They must be
    the ones that were read from the files.
    """
    import os

    from fedspeed.models import loading

    read = []
    honest = loading.WeightFiles.read
    loading.WeightFiles.read = lambda self, name, *rest: (read.append(name), honest(self, name, *rest))[1]
    try:
        options = EngineConfig(
            pipeline="client" if int(os.environ["WORLD_SIZE"]) > 1 else "none", cuts=(1, 2)
        )
        with engine(
            base,
            "resident",
            clients=(tuple(range(int(os.environ["WORLD_SIZE"]))),),
            adapter=LORA,
            options=options,
        ) as client_engine:
            real = {
                n for n, p in client_engine.model.named_parameters() if not p.is_meta and not p.requires_grad
            }
            assert {n.replace(".base_layer", "").removeprefix("base_model.model.") for n in real} == set(read)
            return sorted(real)
    finally:
        loading.WeightFiles.read = honest


@pytest.mark.parametrize(
    "cuts,text",
    [((1,), "2 ascending numbers between 0 and 4"), ((2, 2), "ascending"), ((0, 2), "write auto")],
)
def test_cuts_that_do_not_fit_are_refused(cuts, text):
    from fedspeed.engine.base.placement import layout_of
    from fedspeed.errors import FedSpeedError

    with pytest.raises(FedSpeedError, match=text):
        layout_of(EngineConfig(pipeline="client", cuts=cuts), "resident", 4, 3)


def dies(rank, base, victim, kind):
    """Return the error of a survivor when the victim dies in the middle of a step."""
    import os
    import signal

    from fedspeed.engine.pipeline.engine import FederatedPipelineEngine
    from fedspeed.errors import LostPeerError

    done = []

    def dying(self, **of):
        done.append(of)
        if rank == victim and len(done) == (1 if kind == "Step" else 2):
            os.kill(os.getpid(), signal.SIGKILL)
        method(self, **of)

    table = FederatedPipelineEngine._INSTRUCTION_MAP
    instruction, method = next((i, m) for i, m in table.items() if i.__name__ == kind)
    table[instruction] = dying
    options = EngineConfig(pipeline="client", cuts=(1, 2))
    with (
        engine(
            base, "resident", clients=((0, 1, 2),), adapter=LORA, options=options, gradient_clipping=0.05
        ) as client_engine,
        pytest.raises(LostPeerError) as error,
    ):
        client_engine.load(stirred(client_engine.state()))
        client_engine.train_step([random_step(3, 2, 6)], 0.01)
    return str(error.value)


@pytest.mark.parametrize(
    "victim,kind", [(0, "Forward"), (1, "Backward"), (2, "Forward"), (2, "Backward"), (1, "Step")]
)
def test_survivors_say_who_was_lost_and_in_which_instruction(bases, victim, kind):
    messages = run_clusters([3], dies, bases["llama"], victim, kind, mortal=frozenset({victim}))
    texts = [text for rank, text in enumerate(messages) if rank != victim]
    assert all(
        "of this pipeline was lost" in text and "(in " in text and "resumes from the journal" in text
        for text in texts
    )
    assert (
        any(f"rank {victim} of this pipeline was lost" in text for text in texts)
        or kind == "Step"
        and all("in Step(client=0)" in text for text in texts)
    )

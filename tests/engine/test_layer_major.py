"""Compare layer-major execution with plain autograd over the same model, and count its loads."""

from dataclasses import replace

import numpy as np
import pytest

from fedspeed.data.batches import Batch
from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig, LastBlocks
from tests.engine.engines import engine
from tests.engine.small_models import DETERMINED, LORA, LR, losses_and_state, stirred
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_every_family_trains_as_under_autograd(bases, tmp_path, family):
    [(before, losses, state)] = run_clusters([1], losses_and_state, bases[family], "ram", tmp_path)
    [(expected_before, expected, end)] = run_clusters([1], losses_and_state, bases[family], "zero0", tmp_path)
    for sums, reference in zip(before, expected_before, strict=True):
        assert (sums.tokens, sums.exact, sums.rows) == (reference.tokens, reference.exact, reference.rows)
        assert sums.loss == pytest.approx(reference.loss, rel=1e-5)
    assert np.abs(np.array(losses) / expected - 1).max() < 1e-5
    assert losses[2] < losses[0]
    assert max(np.abs(state[n] - end[n]).max() for n in end) < 1e-5


def exact_answers(rank, base, kind, nvme):
    """Return (exact answers, rows) of one prompt answered with every token, whole and cut, and whether both
    have the same loss. Greedy decoding gives exactly one of the rows.
    """
    vocabulary = 260
    ids = np.tile(np.arange(3, 11), (vocabulary, 1))
    ids[:, -1] = np.arange(vocabulary)
    labels = np.where(np.arange(8) < 7, -100, ids)
    whole = Batch(ids, labels, np.ones_like(ids), vocabulary)
    with engine(base, kind, adapter=LORA, train=TrainConfig(optimizer="sgd"), nvme=nvme) as client_engine:
        sums = client_engine.evaluate([[whole], [replace(whole, cut=tuple(range(vocabulary)))]])
        return [(s.exact, s.rows) for s in sums], sums[0].loss == sums[1].loss


@pytest.mark.parametrize("kind", ["ram", "zero0"])
def test_a_cut_answer_is_never_exact(bases, tmp_path, kind):
    [(counts, same_loss)] = run_clusters([1], exact_answers, bases["llama"], kind, tmp_path)
    assert counts == [(1, 260), (0, 260)]
    assert same_loss


def dropped(rank, base, dropout=0.3):
    """Compare gradients with dropout: as the engine computes them, and by one autograd graph over the same
    masks.
    """
    import torch

    from fedspeed.engine.compute.micro_batches import MicroBatchTask

    step = random_step(3, 2, 2)
    # With everything resident the blocks can also be differentiated as one graph.
    with engine(
        base, "resident", adapter=AdapterConfig(targets="all-linear", dropout=dropout)
    ) as client_engine:
        client_engine.load(stirred(client_engine.state()))
        executor = client_engine._executor
        tensors = client_engine._states[0].tensors()
        stage = executor.stage
        tasks = [MicroBatchTask(batch, 0, scale=0.1, seed=i + 1) for i, batch in enumerate(step.micro)]
        scores, [grads] = executor.train(tasks, [tensors])
        again, [same] = executor.train(tasks, [tensors])
        for task in tasks:
            task.seed += 7
        others, _ = executor.train(tasks, [tensors])
        for task in tasks:
            task.seed -= 7
        whole = {}
        blocks = range(len(stage.trainable))
        stage.begin(tasks, [tensors], (), train=True)
        stage._bind(blocks, 0)
        places = {n: p for block in stage.trainable for n, p in block}
        for m, task in enumerate(tasks):
            hidden = stage.embed(m).requires_grad_(True)
            hidden = stage._through(m, blocks, hidden, grad=True)
            _, upward = stage.compute.head(hidden.detach(), task)
            for n, g in zip(places, torch.autograd.grad(hidden, list(places.values()), upward)):
                whole[n] = whole.get(n, 0) + g
        difference = max((grads[n] - whole[n]).abs().max().item() for n in whole)
        repeat = max((grads[n] - same[n]).abs().max().item() for n in grads)
        return (
            difference,
            repeat,
            [s.loss for s in scores] == [s.loss for s in again],
            [s.loss for s in scores] == [s.loss for s in others],
        )


def test_dropout_draws_the_same_masks_when_a_block_is_computed_again(bases):
    [(difference, repeat, same_losses, other_losses)] = run_clusters([1], dropped, bases["llama"])
    assert difference < 1e-6 and repeat == 0.0
    assert same_losses and not other_losses


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dropout_inside_attention_has_no_module_and_counts_all_the_same(bases, tmp_path, family):
    import json
    import shutil

    base = shutil.copytree(bases[family], tmp_path / family)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    [(difference, repeat, same_losses, other_losses)] = run_clusters([1], dropped, str(base), 0.0)
    assert difference < 1e-6 and repeat == 0.0
    assert same_losses and not other_losses


def pieces_of_logits(rank, base, logits_mib):
    """Return the rows of the chunks in which 3000 rows of 260 logits in fp32 are computed."""
    import torch

    with engine(base, "resident", options=EngineConfig(logits_mib=logits_mib)) as client_engine:
        pieces = client_engine._executor.stage.compute.pieces(torch.zeros(3000, 1))
        return [piece.stop - piece.start for piece in pieces]


@pytest.mark.parametrize(("logits_mib", "rows"), [("auto", 64 << 20), (1, 1 << 20)])
def test_logits_are_computed_in_chunks_of_the_configured_size(bases, logits_mib, rows):
    [found] = run_clusters([1], pieces_of_logits, str(bases["llama"]), logits_mib)
    assert set(found) == {rows // (4 * 260)} and len(found) == -(-3000 // found[0])


# Compared with stock DeepSpeed with activation checkpointing.


def as_stock(rank, base, kind, dtype):
    options = EngineConfig(activation_checkpointing=kind == "zero3")
    with engine(
        base,
        kind,
        dtype,
        clients=[(0,), (1,)],
        adapter=LORA,
        train=TrainConfig(optimizer="sgd"),
        options=options,
    ) as client_engine:
        client_engine.load({n: v.to(v.dtype) for n, v in stirred(client_engine.state()).items()})
        with client_engine.matched_passes(client_engine.train_passes(1, 4, 3), backward=True):
            losses = [client_engine.train_step([random_step(rank, 2, 3)], 0.5)[0].loss for _ in range(4)]
        return losses, {n: v.detach().float().numpy() for n, v in client_engine.state().items()}


@pytest.mark.parametrize(
    "dtype,loss_off,adapter_off",
    [("fp32", 1e-6, 1e-5), pytest.param("bf16", 1e-3, 0.05, marks=pytest.mark.slow)],
)
def test_losses_and_adapter_are_those_of_stock_zero_3_with_checkpointing(bases, dtype, loss_off, adapter_off):
    ours = run_clusters([2], as_stock, bases["llama"], "cluster", dtype)
    stock = run_clusters([2], as_stock, bases["llama"], "zero3", dtype)
    for (losses, state), (expected, end) in zip(ours, stock, strict=True):
        assert np.abs(np.array(losses) / expected - 1).max() < loss_off and losses[3] < losses[0]
        largest = max(np.abs(v).max() for v in end.values())
        assert max(np.abs(state[n] - end[n]).max() for n in end) < adapter_off * largest


# Several clients in one pass.


def taken_together(rank, base, client_slots, nvme):
    """Return states and optimizers of three clients after two steps each, taken `client_slots` at a time,
    with dropout, clipping and AdamW.
    """
    adapter = AdapterConfig(targets="all-linear", dropout=0.2)
    train = TrainConfig(weight_decay=0.1, clip=0.05)
    with engine(
        base,
        "ram",
        adapter=adapter,
        train=train,
        nvme=nvme,
        client_slots=client_slots,
        gradient_clipping=0.05,
    ) as client_engine:
        start = client_engine.state()
        out = []
        loads = []
        for first in range(0, 3, client_slots):
            clients = range(first, min(3, first + client_slots))
            for client_slot, client in enumerate(clients):
                client_engine.load(stirred(start, seed=client), seed=40 + client, slot=client_slot)
            client_engine.store.take_loads()
            for i in range(2):
                sums = client_engine.train_step(
                    [random_step(10 * client + i, 2, 1 + client) for client in clients], LR
                )
            loads.append(client_engine.store.take_loads().count)
            out += [
                (
                    {n: v.detach().numpy() for n, v in client_engine.state(client_slot).items()},
                    {n: v.detach().numpy() for n, v in client_engine.optimizer_state(client_slot).items()},
                    sums[client_slot].loss,
                )
                for client_slot in range(len(clients))
            ]
        return out, loads


def test_clients_in_one_pass_train_as_one_after_another(bases, tmp_path):
    [(alone, loads_alone)] = run_clusters([1], taken_together, bases["llama"], 1, tmp_path)
    for client_slots in (2, 3):
        [(together, loads)] = run_clusters([1], taken_together, bases["llama"], client_slots, tmp_path)
        for (state, optimizer, loss), (expected, kept, lost) in zip(together, alone, strict=True):
            assert loss == lost
            assert all(np.array_equal(state[n], expected[n]) for n in expected)
            assert all(np.array_equal(optimizer[n], kept[n]) for n in kept)
        assert max(loads) <= max(loads_alone), "a pass of several clients loads no more than one client's"
    assert not np.array_equal(*(next(iter(state.values())) for state, _, _ in alone[:2]))


# What is loaded.


def loads_of_steps(rank, base, kind, slots, nvme):
    with engine(
        base,
        kind,
        adapter=LORA,
        nvme=nvme,
        options=EngineConfig(block_slots=slots),
        clients=[(0,), (1,)][: 1 + (kind == "cluster")],
    ) as client_engine:
        client_engine.load(client_engine.state())
        units = {u.name: u.nbytes for u in client_engine.store.units}
        seen = []
        for micro in (1, 4, 16):
            for repeat in range(2):
                client_engine.train_step([random_step(1, 1, micro)], LR)
                loads = client_engine.store.take_loads()
                seen.append((sum(loads.bytes.values()), loads.count))
        return seen, units


@pytest.mark.parametrize(
    "kind,ranks", [("ram", 1), ("nvme", 1), pytest.param("cluster", 2, marks=pytest.mark.slow)]
)
def test_a_step_loads_the_base_twice_whatever_the_micro_batches(bases, tmp_path, kind, ranks):
    """Blocks in the slots when the backward pass begins are not loaded again: a step loads 2 N - 2 blocks
    with one slot and 2 N - 4 with two.
    """
    for slots in (1, 2):
        for seen, units in run_clusters([ranks], loads_of_steps, bases["llama"], kind, slots, tmp_path):
            blocks = [nbytes for name, nbytes in units.items() if ".layers." in name]
            ends = (
                sum(nbytes for name, nbytes in units.items() if "embed" in name or "lm_head" in name)
                if kind == "cluster"
                else 0
            )
            assert len(blocks) == 4 and len(set(blocks)) == 1
            assert {s[0] for s in seen[1:]} == {(2 * len(blocks) - 2 * slots) * blocks[0] + ends}
            assert seen[0][0] <= 2 * sum(units.values())


# Memory on the device.


def device_memory(rank, base, kind, nvme):
    """Return (accounted peak of a step, peak that the allocator reports) in bytes."""
    import json
    from pathlib import Path

    from torch.profiler import ProfilerActivity, profile

    from fedspeed.engine.memory_counter import storage_bytes

    with engine(base, kind, "bf16", adapter=LORA, nvme=nvme) as client_engine:
        client_engine.load(client_engine.state())
        step = random_step(1, 4, 3, length=96)
        client_engine.train_step([step], LR)
        standing = storage_bytes(client_engine._persistent_tensors())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            client_engine._gradients([step])
            client_engine._step([0], LR)
        profiler.export_chrome_trace(str(Path(nvme) / f"{kind}.json"))
        events = [
            e
            for e in json.loads((Path(nvme) / f"{kind}.json").read_text())["traceEvents"]
            if e.get("name") == "[memory]"
        ]
        now = 0
        peak = 0
        for event in sorted(events, key=lambda e: e["ts"]):
            now += event["args"]["Bytes"]
            peak = max(peak, now)
        return client_engine.device_bytes, standing + peak


@pytest.mark.parametrize("kind", [pytest.param("zero0", marks=pytest.mark.slow), "zero3", "resident", "ram"])
def test_accounted_memory_is_what_the_allocator_gave(tmp_path, kind):
    base = write_llama(tmp_path / "llama", hidden=128, intermediate=352, layers=6)
    [(accounted, allocated)] = run_clusters([1], device_memory, base, kind, tmp_path)
    assert accounted == pytest.approx(allocated, rel=0.02)


# Chosen blocks.


def trained_blocks(rank, base, kind, blocks, nvme):
    adapter = AdapterConfig(method="blocks", blocks=blocks)
    with engine(base, kind, adapter=adapter, train=DETERMINED, nvme=nvme) as client_engine:
        client_engine.load(client_engine.state())
        step = random_step(3, 2, 3)
        loads = []
        losses = []
        for _ in range(4):
            losses.append(client_engine.train_step([step], 0.1)[0].loss)
            loads.append(client_engine.store.take_loads().count if kind == "ram" else 0)
        return losses, {n: v.detach().numpy() for n, v in client_engine.state().items()}, loads


@pytest.mark.parametrize("family,blocks", [("llama", LastBlocks(1)), ("llama", (1, 3)), ("gpt2", (0, 1))])
def test_chosen_blocks_train_as_under_autograd(bases, tmp_path, family, blocks):
    [(losses, state, loads)] = run_clusters([1], trained_blocks, bases[family], "ram", blocks, tmp_path)
    [(expected, end, _)] = run_clusters([1], trained_blocks, bases[family], "zero0", blocks, tmp_path)
    assert np.abs(np.array(losses) / expected - 1).max() < 1e-5 and losses[3] < losses[0]
    assert state.keys() == end.keys() and max(np.abs(state[n] - end[n]).max() for n in end) < 1e-5
    # With the last block trained, the backward pass does not reach the three frozen ones: 3 loads a step.
    assert blocks != LastBlocks(1) or loads[2:] == [3, 3]

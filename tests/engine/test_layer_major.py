"""Layer-major execution against plain autograd over the same model, and what it loads."""

import os
import signal
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.data.batches import Batch
from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig, LastBlocks
from tests.engine.engines import OPTIONAL, engine, find_optional
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama

LORA = AdapterConfig(targets="all-linear")
LR = 1e-2
# AdamW takes steps of full length along gradients that are nothing but rounding, such as that of GPT-2's key
# bias, which softmax takes no notice of: what it leads to is the processor's business. SGD goes where the
# mathematics says.
DETERMINED = TrainConfig(optimizer="sgd", momentum=0.9, weight_decay=0.1)


def write_family(family: str, folder) -> str:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    if family == "llama":
        return write_llama(folder, layers=4)
    torch.manual_seed(0)
    common = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "qwen2":  # with both kinds of attention: a block is called with another mask than the next
        model = Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=2,
                max_position_embeddings=128,
                **common,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=64,
                n_layer=4,
                n_head=4,
                n_positions=128,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_family(family, folder / family) for family in ("llama", "qwen2", "gpt2")}


def stirred(state, seed=5):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {n: v + 0.02 * torch.randn(v.shape, generator=generator) for n, v in sorted(state.items())}


def losses_and_state(rank, base, kind, nvme):
    step = random_step(3, 2, 3)
    step.micro[1].attention_mask[0, -5:] = 0  # padding: the blocks' masks differ between micro-batches
    step.micro[1].labels[0, -5:] = -100
    with engine(base, kind, adapter=LORA, train=TrainConfig(optimizer="sgd"), nvme=nvme) as own:
        own.load(stirred(own.state()))
        before = own.evaluate([step.micro, step.micro[:1]])
        losses = [own.train_step([step], 0.5)[0].loss for _ in range(3)]
        return before, losses, {n: v.detach().numpy() for n, v in own.state().items()}


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
    """One prompt with every token as its answer: greedy decoding gives one of the rows exactly. Then the
    same, with all answers cut.
    """
    vocabulary = 260
    ids = np.tile(np.arange(3, 11), (vocabulary, 1))
    ids[:, -1] = np.arange(vocabulary)
    labels = np.where(np.arange(8) < 7, -100, ids)
    whole = Batch(ids, labels, np.ones_like(ids), vocabulary)
    with engine(base, kind, adapter=LORA, train=TrainConfig(optimizer="sgd"), nvme=nvme) as own:
        sums = own.evaluate([[whole], [replace(whole, cut=tuple(range(vocabulary)))]])
        return [(s.exact, s.rows) for s in sums], sums[0].loss == sums[1].loss


@pytest.mark.parametrize("kind", ["ram", "zero0"])
def test_a_cut_answer_is_never_exact(bases, tmp_path, kind):
    [(counts, same_loss)] = run_clusters([1], exact_answers, bases["llama"], kind, tmp_path)
    assert counts == [(1, 260), (0, 260)]
    assert same_loss


def dropped(rank, base, dropout=0.3):
    """Gradients with dropout: as the engine computes them, and by one autograd graph over the same masks."""
    import torch

    from fedspeed.engine.compute.micro_batches import MicroBatchTask

    step = random_step(3, 2, 2)
    # With everything resident the blocks can also be differentiated as one graph.
    with engine(base, "resident", adapter=AdapterConfig(targets="all-linear", dropout=dropout)) as own:
        own.load(stirred(own.state()))
        executor = own._executor
        tensors = own._states[0].tensors()
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


# Beside stock DeepSpeed with activation checkpointing, which it stands in for.


def beside_stock(rank, base, kind, dtype):
    options = EngineConfig(activation_checkpointing=kind == "zero3")
    with engine(
        base,
        kind,
        dtype,
        clients=[(0,), (1,)],
        adapter=LORA,
        train=TrainConfig(optimizer="sgd"),
        options=options,
    ) as own:
        own.load({n: v.to(v.dtype) for n, v in stirred(own.state()).items()})
        with own.matched_passes(own.train_passes(1, 4, 3), backward=True):
            losses = [own.train_step([random_step(rank, 2, 3)], 0.5)[0].loss for _ in range(4)]
        return losses, {n: v.detach().float().numpy() for n, v in own.state().items()}


@pytest.mark.parametrize(
    "dtype,loss_off,adapter_off",
    [("fp32", 1e-6, 1e-5), pytest.param("bf16", 1e-3, 0.05, marks=pytest.mark.slow)],
)
def test_losses_and_adapter_are_those_of_stock_zero_3_with_checkpointing(bases, dtype, loss_off, adapter_off):
    ours = run_clusters([2], beside_stock, bases["llama"], "cluster", dtype)
    stock = run_clusters([2], beside_stock, bases["llama"], "zero3", dtype)
    for (losses, state), (expected, end) in zip(ours, stock, strict=True):
        assert np.abs(np.array(losses) / expected - 1).max() < loss_off and losses[3] < losses[0]
        largest = max(np.abs(v).max() for v in end.values())
        assert max(np.abs(state[n] - end[n]).max() for n in end) < adapter_off * largest


# Several clients in one pass.


def seated(rank, base, client_slots, nvme):
    """States and optimizers of three clients after two steps each, taken `client_slots` at a time, with
    dropout, clipping and AdamW.
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
    ) as own:
        start = own.state()
        out = []
        loads = []
        for first in range(0, 3, client_slots):
            clients = range(first, min(3, first + client_slots))
            for seat, client in enumerate(clients):
                own.load(stirred(start, seed=client), seed=40 + client, slot=seat)
            own.store.take_loads()
            for i in range(2):
                sums = own.train_step([random_step(10 * client + i, 2, 1 + client) for client in clients], LR)
            loads.append(own.store.take_loads().count)
            out += [
                (
                    {n: v.detach().numpy() for n, v in own.state(seat).items()},
                    {n: v.detach().numpy() for n, v in own.optimizer_state(seat).items()},
                    sums[seat].loss,
                )
                for seat in range(len(clients))
            ]
        return out, loads


def test_clients_in_one_pass_train_as_one_after_another(bases, tmp_path):
    [(alone, loads_alone)] = run_clusters([1], seated, bases["llama"], 1, tmp_path)
    for client_slots in (2, 3):
        [(together, loads)] = run_clusters([1], seated, bases["llama"], client_slots, tmp_path)
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
    ) as own:
        own.load(own.state())
        units = {u.name: u.nbytes for u in own.store.units}
        seen = []
        for micro in (1, 4, 16):
            for repeat in range(2):
                own.train_step([random_step(1, 1, micro)], LR)
                loads = own.store.take_loads()
                seen.append((sum(loads.bytes.values()), loads.count))
        return seen, units


@pytest.mark.parametrize("kind,ranks", [("ram", 1), ("nvme", 1), ("cluster", 2)])
def test_a_step_loads_the_base_twice_whatever_the_micro_batches(bases, tmp_path, kind, ranks):
    """And what is in the slots when the direction turns is not loaded again: with one slot 2 N - 2 blocks,
    with two 2 N - 4.
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
    """(accounted peak of a step, the allocator's own) in bytes."""
    import json
    from pathlib import Path

    from torch.profiler import ProfilerActivity, profile

    from fedspeed.engine.client_engine import storage_bytes

    with engine(base, kind, "bf16", adapter=LORA, nvme=nvme) as own:
        own.load(own.state())
        step = random_step(1, 4, 3, length=96)
        own.train_step([step], LR)
        standing = storage_bytes(own._persistent_tensors())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            own._gradients([step])
            own._step([0], LR)
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
        return own.device_bytes, standing + peak


@pytest.mark.parametrize("kind", [pytest.param("zero0", marks=pytest.mark.slow), "zero3", "resident", "ram"])
def test_accounted_memory_is_what_the_allocator_gave(tmp_path, kind):
    base = write_llama(tmp_path / "llama", hidden=128, intermediate=352, layers=6)
    [(accounted, allocated)] = run_clusters([1], device_memory, base, kind, tmp_path)
    assert accounted == pytest.approx(allocated, rel=0.02)


# Chosen blocks.


def trained_blocks(rank, base, kind, blocks, nvme):
    adapter = AdapterConfig(method="blocks", blocks=blocks)
    with engine(base, kind, adapter=adapter, train=DETERMINED, nvme=nvme) as own:
        own.load(own.state())
        step = random_step(3, 2, 3)
        loads = []
        losses = []
        for _ in range(4):
            losses.append(own.train_step([step], 0.1)[0].loss)
            loads.append(own.store.take_loads().count if kind == "ram" else 0)
        return losses, {n: v.detach().numpy() for n, v in own.state().items()}, loads


@pytest.mark.parametrize("family,blocks", [("llama", LastBlocks(1)), ("llama", (1, 3)), ("gpt2", (0, 1))])
def test_chosen_blocks_train_as_under_autograd(bases, tmp_path, family, blocks):
    [(losses, state, loads)] = run_clusters([1], trained_blocks, bases[family], "ram", blocks, tmp_path)
    [(expected, end, _)] = run_clusters([1], trained_blocks, bases[family], "zero0", blocks, tmp_path)
    assert np.abs(np.array(losses) / expected - 1).max() < 1e-5 and losses[3] < losses[0]
    assert state.keys() == end.keys() and max(np.abs(state[n] - end[n]).max() for n in end) < 1e-5
    # Three of the four blocks are frozen with last:1, and the backward pass does not come down to them; two
    # slots keep two of three.
    assert blocks != "last:1" or loads[2:] == [3, 3]


# Quantised.


def quantised_base(rank, base, folder, kind):
    """A copy of a base whose blocks' matrices went through bitsandbytes and back."""
    assert find_optional()
    import bitsandbytes.functional as library
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.dim() == 2:
                if kind == "int8":
                    weight.copy_(
                        library.dequantize_blockwise(*library.quantize_blockwise(weight.data, blocksize=256))
                    )
                else:
                    weight.copy_(
                        library.dequantize_4bit(
                            *library.quantize_4bit(weight.data, blocksize=64, quant_type="nf4")
                        )
                    )
    model.save_pretrained(folder)
    return str(folder)


needs_bitsandbytes = pytest.mark.skipif(
    not (OPTIONAL / "bitsandbytes").is_dir() and find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes, which bash launchers/test.sh installs",
)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_that_base_rounded(bases, tmp_path, kind):
    [rounded] = run_clusters([1], quantised_base, bases["llama"], tmp_path / "rounded", kind)
    [(_, losses, state)] = run_clusters([1], losses_and_state, bases["llama"], kind, tmp_path)
    [(_, expected, end)] = run_clusters([1], losses_and_state, rounded, "resident", tmp_path)
    [(_, exact, _)] = run_clusters([1], losses_and_state, bases["llama"], "resident", tmp_path)
    assert losses == expected and all(np.array_equal(state[n], end[n]) for n in end)
    assert losses != exact, "rounding must be seen"


def held_bytes(rank, base, kind):
    from fedspeed.engine.client_engine import storage_bytes

    with engine(base, kind, "bf16", adapter=LORA) as own:
        return storage_bytes(own._persistent_tensors())


@needs_bitsandbytes
def test_a_quantised_base_takes_its_share(tmp_path):
    from fedspeed.models.catalogue import shape_of
    from fedspeed.planner.memory import quantised_block, sizes
    from fedspeed.planner.plan import Task

    base = write_llama(tmp_path / "llama", hidden=256, intermediate=704, layers=12)
    [resident], [int8], [nf4] = (
        run_clusters([1], held_bytes, base, kind) for kind in ("resident", "int8", "nf4")
    )
    task = Task(shape_of(base), clients=1)
    for tier, held in (("int8", int8), ("nf4", nf4)):
        saved = (
            12 * (sizes(task.shape, 2).block - quantised_block(task, tier)) - 2 * sizes(task.shape, 2).block
        )  # two slots beside it
        assert resident - held == pytest.approx(saved, rel=0.02), "what the planner says"
    assert 0.65 < (resident - nf4) / (12 * sizes(task.shape, 2).block) + 1 / 6


# Who holds what, and who must wait for whom.


def resident_loads(rank, base, resident, nvme):
    with engine(base, "ram", adapter=LORA, nvme=nvme, options=EngineConfig(resident_blocks=resident)) as own:
        own.load(own.state())
        losses = [own.train_step([random_step(1, 2, 2)], LR)[0].loss for _ in range(3)]
        own.store.take_loads()
        own.train_step([random_step(1, 2, 2)], LR)
        return losses, own.store.take_loads().count


def test_blocks_that_stay_are_not_loaded(bases, tmp_path):
    seen = {
        resident: run_clusters([1], resident_loads, bases["llama"], resident, tmp_path)[0]
        for resident in (0, 1, 2, 4, 9)
    }
    assert {resident: count for resident, (_, count) in seen.items()} == {
        0: 4,
        1: 2,
        2: 0,
        4: 0,
        9: 0,
    }  # of 4 blocks, with two slots
    assert all(losses == seen[0][0] for losses, _ in seen.values())


def divided(rank, base, kind, nvme):
    """(bytes of the base that this rank keeps, bytes of all of it, losses) with two ranks that take unequal
    numbers of steps.
    """
    with engine(
        base, kind, adapter=LORA, nvme=nvme, clients=[(r,) for r in range(int(os.environ["WORLD_SIZE"]))]
    ) as own:
        own.load(own.state())
        kept = sum(t.numel() for tier in own.store._tiers for t in getattr(tier, "_slices", {}).values())
        steps = 1 + 2 * rank
        if kind == "cluster":
            with own.matched_passes(own.train_passes(1, steps, 1), backward=True):
                losses = [own.train_step([random_step(rank, 2, 2)], LR)[0].loss for _ in range(steps)]
        else:  # no word to the other rank
            losses = [own.train_step([random_step(rank, 2, 2)], LR)[0].loss for _ in range(steps)]
        return (
            kept,
            sum(unit.nbytes for i, unit in enumerate(own.store.units) if i in own.store._pool_of),
            losses,
        )


def test_a_divided_base_lies_in_equal_parts_and_other_tiers_need_no_lockstep(tmp_path):
    base = write_llama(tmp_path / "wide", hidden=256, intermediate=704, layers=6, vocab=512)
    cluster = run_clusters([2], divided, base, "cluster", tmp_path)
    for kept, whole, _ in cluster:
        assert abs(kept / (whole / 2) - 1) < 0.02 and whole > 4 * 4_000_000
    for kind in ("ram", "nvme"):
        for (_, _, losses), (_, _, expected) in zip(
            run_clusters([2], divided, base, kind, tmp_path), cluster
        ):
            assert losses == expected


def one_sided(rank, base, nodes):
    """(losses, ranks that must pass together, bytes of the base this rank's memory holds) with unequal
    numbers of steps and no word to the others.
    """
    import torch

    import fedspeed.engine.base.node_file as shared

    shared.socket = SimpleNamespace(gethostname=lambda: f"node{nodes[rank]}")
    with engine(
        base,
        "cluster",
        adapter=LORA,
        clients=[(r,) for r in range(len(nodes))],
        options=EngineConfig(base_reads="one_sided"),
    ) as own:
        own.load(own.state())
        with own.matched_passes(own.train_passes(1, 1 + 2 * rank, 1), backward=True):  # nothing to agree on
            losses = [own.train_step([random_step(rank, 2, 2)], LR)[0].loss for _ in range(1 + 2 * rank)]
        sums = own.evaluate([random_step(rank, 2, 2).micro])[0]
        torch.distributed.barrier()
        return losses, own.store.matched_group, sum(t.numel() for t in own._away()), sums.loss


@pytest.mark.parametrize(
    "nodes",
    [pytest.param([0, 1], marks=pytest.mark.slow), pytest.param([0, 0], marks=pytest.mark.slow), [0, 0, 1]],
)
def test_one_sided_reads_need_no_lockstep(tmp_path, nodes):
    base = write_llama(tmp_path / "wide", hidden=256, intermediate=704, layers=6, vocab=512)
    found = run_clusters([len(nodes)], one_sided, base, nodes)
    alone = run_clusters([len(nodes)], divided, base, "ram", tmp_path)
    for (losses, matched, _, held_out), (_, _, expected) in zip(found, alone, strict=True):
        assert losses == expected and matched is None and 0 < held_out < float("inf")
    whole = alone[0][1]
    for node in set(nodes):
        assert abs(found[nodes.index(node)][2] / (whole * nodes.count(node) / len(nodes)) - 1) < 0.03, (
            "a node keeps its ranks' share, once"
        )


def bereft(rank, base, told):
    """Writes down what a rank is told when the other, which holds half of the base, is killed."""
    import torch

    import fedspeed.engine.base.node_file as shared
    from fedspeed.errors import LostPeerError

    shared.socket = SimpleNamespace(gethostname=lambda: f"node{rank}")
    with engine(base, "cluster", clients=[(0,), (1,)], options=EngineConfig(base_reads="one_sided")) as own:
        own.load(own.state())
        own.train_step([random_step(rank, 2, 2)], LR)
        torch.distributed.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            for _ in range(3):
                own.train_step([random_step(rank, 2, 2)], LR)
        except LostPeerError as error:
            own.close()
            told.write_text(str(error))
        os._exit(0)  # the world has lost a rank: no orderly end


def test_a_killed_holder_of_the_base_is_told(bases, tmp_path):
    with pytest.raises(AssertionError, match="rank 1:\ndied without a word"):
        run_clusters([2], bereft, bases["llama"], tmp_path / "told")
    assert (
        "the part of the base at 127.0.0.1:" in (told := (tmp_path / "told").read_text())
        and "cannot be read" in told
    )


def test_a_budget_keeps_as_many_blocks_as_it_allows(bases, tmp_path):
    """One block and the slots: 4 blocks, one stays, two of three stream through the slots, so a step loads 2
    (4 - 1 - 2).
    """
    [(counts, base_on_device, budget)] = run_clusters([1], within_budget, bases["llama"], tmp_path)
    assert counts == {2} and base_on_device <= budget


def within_budget(rank, base, nvme):
    with engine(base, "ram", adapter=LORA, nvme=nvme) as own:
        block = next(u.nbytes for u in own.store.units if ".layers." in u.name)
        *ends, norm = (
            u.nbytes
            for u in sorted(own.store.units, key=lambda u: "norm" in u.name)
            if ".layers." not in u.name
        )
    budget = 3 * block + max(ends) + norm + 100
    with engine(base, "ram", adapter=LORA, nvme=nvme, options=EngineConfig(base_gib=budget / 2**30)) as own:
        own.load(own.state())
        own.train_step([random_step(1, 2, 2)], LR)
        own.store.take_loads()
        counts = set()
        for _ in range(2):
            own.train_step([random_step(1, 2, 2)], LR)
            counts.add(own.store.take_loads().count)
        kept = sum(u.nbytes for i, u in enumerate(own.store.units) if i not in own.store._pool_of)
        return counts, kept + own.store.slot_bytes, budget

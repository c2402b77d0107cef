"""Where the frozen base is stored: on the device in 8 or 4 bit, in slots, or divided over the ranks of a
cluster; and which ranks must pass through the model together.
"""

import os
import signal
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.engine.config import EngineConfig
from tests.engine.engines import OPTIONAL, engine, find_optional
from tests.engine.small_models import LORA, LR, losses_and_state
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama

# Quantised.


def quantised_base(rank, base, folder, kind):
    """Write a copy of a base whose blocks' matrices were quantised by bitsandbytes and dequantised again."""
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
@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_quantised_base_is_that_base_rounded(bases, tmp_path, kind):
    [rounded] = run_clusters([1], quantised_base, bases["llama"], tmp_path / "rounded", kind)
    [(_, losses, state)] = run_clusters([1], losses_and_state, bases["llama"], kind, tmp_path)
    [(_, expected, end)] = run_clusters([1], losses_and_state, rounded, "resident", tmp_path)
    [(_, exact, _)] = run_clusters([1], losses_and_state, bases["llama"], "resident", tmp_path)
    assert losses == expected and all(np.array_equal(state[n], end[n]) for n in end)
    assert losses != exact, "rounding must be seen"


def stored_bytes(rank, base, kind):
    from fedspeed.engine.memory_counter import storage_bytes

    with engine(base, kind, "bf16", adapter=LORA) as client_engine:
        return storage_bytes(client_engine._persistent_tensors())


@needs_bitsandbytes
def test_a_quantised_base_takes_its_share(tmp_path):
    from fedspeed.models.catalogue import shape_of
    from fedspeed.planner.memory import quantised_block, sizes
    from fedspeed.planner.plan import Task

    base = write_llama(tmp_path / "llama", hidden=256, intermediate=704, layers=12)
    [resident], [int8], [nf4] = (
        run_clusters([1], stored_bytes, base, kind) for kind in ("resident", "int8", "nf4")
    )
    task = Task(shape_of(base), clients=1)
    for tier, stored in (("int8", int8), ("nf4", nf4)):
        saved = (
            12 * (sizes(task.shape, 2).block - quantised_block(task, tier)) - 2 * sizes(task.shape, 2).block
        )  # two slots hold dequantised blocks
        assert resident - stored == pytest.approx(saved, rel=0.02), "what the planner says"
    assert 0.65 < (resident - nf4) / (12 * sizes(task.shape, 2).block) + 1 / 6


# Blocks on the device and on other ranks.


def resident_loads(rank, base, resident, nvme):
    with engine(
        base, "ram", adapter=LORA, nvme=nvme, options=EngineConfig(resident_blocks=resident)
    ) as client_engine:
        client_engine.load(client_engine.state())
        losses = [client_engine.train_step([random_step(1, 2, 2)], LR)[0].loss for _ in range(3)]
        client_engine.store.take_loads()
        client_engine.train_step([random_step(1, 2, 2)], LR)
        return losses, client_engine.store.take_loads().count


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
    """Return (bytes of the base that this rank stores, bytes of the whole base, losses) where the ranks take
    unequal numbers of steps.
    """
    with engine(
        base, kind, adapter=LORA, nvme=nvme, clients=[(r,) for r in range(int(os.environ["WORLD_SIZE"]))]
    ) as client_engine:
        client_engine.load(client_engine.state())
        kept = sum(
            t.numel() for tier in client_engine.store._tiers for t in getattr(tier, "_slices", {}).values()
        )
        steps = 1 + 2 * rank
        if kind == "cluster":
            with client_engine.matched_passes(client_engine.train_passes(1, steps, 1), backward=True):
                losses = [
                    client_engine.train_step([random_step(rank, 2, 2)], LR)[0].loss for _ in range(steps)
                ]
        else:  # without an agreement with the other rank
            losses = [client_engine.train_step([random_step(rank, 2, 2)], LR)[0].loss for _ in range(steps)]
        return (
            kept,
            sum(
                unit.nbytes
                for i, unit in enumerate(client_engine.store.units)
                if i in client_engine.store._pool_of
            ),
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
    """Return (losses, ranks that must pass together, bytes of the base in this rank's memory, evaluated loss)
    where the ranks take unequal numbers of steps without matching their passes.
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
    ) as client_engine:
        client_engine.load(client_engine.state())
        with client_engine.matched_passes(
            client_engine.train_passes(1, 1 + 2 * rank, 1), backward=True
        ):  # nothing to agree on
            losses = [
                client_engine.train_step([random_step(rank, 2, 2)], LR)[0].loss for _ in range(1 + 2 * rank)
            ]
        sums = client_engine.evaluate([random_step(rank, 2, 2).micro])[0]
        torch.distributed.barrier()
        return (
            losses,
            client_engine.store.matched_group,
            sum(t.numel() for t in client_engine._away()),
            sums.loss,
        )


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


def loses_a_peer(rank, base, message_file):
    """Write the error of a rank to a file when the other one, which stores half of the base, is killed."""
    import torch

    import fedspeed.engine.base.node_file as shared
    from fedspeed.errors import LostPeerError

    shared.socket = SimpleNamespace(gethostname=lambda: f"node{rank}")
    with engine(
        base, "cluster", clients=[(0,), (1,)], options=EngineConfig(base_reads="one_sided")
    ) as client_engine:
        client_engine.load(client_engine.state())
        client_engine.train_step([random_step(rank, 2, 2)], LR)
        torch.distributed.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            for _ in range(3):
                client_engine.train_step([random_step(rank, 2, 2)], LR)
        except LostPeerError as error:
            client_engine.close()
            message_file.write_text(str(error))
        os._exit(0)  # the world has lost a rank: no orderly exit


def test_a_killed_rank_that_stored_the_base_is_reported(bases, tmp_path):
    with pytest.raises(AssertionError, match="rank 1:\ndied without a word"):
        run_clusters([2], loses_a_peer, bases["llama"], tmp_path / "message")
    message = (tmp_path / "message").read_text()
    assert "the part of the base at 127.0.0.1:" in message and "cannot be read" in message


def test_a_budget_keeps_as_many_blocks_as_it_allows(bases, tmp_path):
    """Of 4 blocks one is resident, and the other three share two slots, so a step loads 2 x (3 - 2)."""
    [(counts, base_on_device, budget)] = run_clusters([1], within_budget, bases["llama"], tmp_path)
    assert counts == {2} and base_on_device <= budget


def within_budget(rank, base, nvme):
    with engine(base, "ram", adapter=LORA, nvme=nvme) as client_engine:
        block = next(u.nbytes for u in client_engine.store.units if ".layers." in u.name)
        *ends, norm = (
            u.nbytes
            for u in sorted(client_engine.store.units, key=lambda u: "norm" in u.name)
            if ".layers." not in u.name
        )
    budget = 3 * block + max(ends) + norm + 100
    with engine(
        base, "ram", adapter=LORA, nvme=nvme, options=EngineConfig(base_gib=budget / 2**30)
    ) as client_engine:
        client_engine.load(client_engine.state())
        client_engine.train_step([random_step(1, 2, 2)], LR)
        client_engine.store.take_loads()
        counts = set()
        for _ in range(2):
            client_engine.train_step([random_step(1, 2, 2)], LR)
            counts.add(client_engine.store.take_loads().count)
        kept = sum(
            u.nbytes for i, u in enumerate(client_engine.store.units) if i not in client_engine.store._pool_of
        )
        return counts, kept + client_engine.store.slot_bytes, budget

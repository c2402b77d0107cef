"""Where the frozen base lies: on the device in 8 or 4 bit, in slots, divided over the ranks of a cluster, and
which ranks must pass through the model together.
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

    import fedspeed.engine.base.shared as shared

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

    import fedspeed.engine.base.shared as shared
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

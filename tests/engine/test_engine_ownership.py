"""Who stores what: the frozen base is divided over the ranks of a cluster, an adapter is in its own client's
memory only, and frozen tensors keep their values.
"""

import pytest
import torch

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig
from fedspeed.models.factors import is_factor_a
from tests.engine.engines import engine
from tests.engine.small_models import LR, drawn
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """Write a model of 4.3 M parameters, most of them in matrices far above the persistence threshold."""
    return write_llama(
        tmp_path_factory.mktemp("base") / "wide",
        hidden=256,
        intermediate=1024,
        layers=4,
        kv_heads=4,
        vocab=512,
    )


def storage_of(rank, base, nvme, partition):
    """Return the bytes of the frozen base on this rank and in all, the process groups of the adapter, and the
    adapter's checksum after the client's steps.
    """
    with engine(
        base, "zero3", clients=[(0,), (1,), (2, 3)], nvme=nvme, options=EngineConfig(base_partition=partition)
    ) as client_engine:
        frozen = [p for p in client_engine.model.parameters() if not p.requires_grad]
        trained = [p for p in client_engine.model.parameters() if p.requires_grad]
        stored = sum(
            (p.ds_tensor.numel() + p.numel()) * p.element_size() for p in frozen
        )  # p itself is empty between passes
        whole = sum(p.ds_numel * p.element_size() for p in frozen)
        client_engine.load(client_engine.state())
        steps = (
            1 + client_engine.groups.client_ranks[0] % 2
        )  # different numbers of steps on the ranks of one cluster
        with client_engine.matched_passes(steps, backward=True):
            for i in range(steps):
                client_engine.train_step(
                    [
                        random_step(
                            100 * client_engine.groups.client_ranks[0] + i,
                            2,
                            1,
                            client_engine.groups.client_size,
                            client_engine.groups.client_rank,
                        )
                    ],
                    LR,
                )[0]
        stored = max(stored, sum((p.ds_tensor.numel() + p.numel()) * p.element_size() for p in frozen))
        # reading the masters is a collective over the ranks of the client only
        return {
            "stored": stored,
            "whole": whole,
            "groups": {p.ds_zero_partition_world_size for p in trained},
            "client": client_engine.groups.client_size,
            "storage": {id(p.ds_process_group) for p in trained} == {id(client_engine.groups.client)},
            "sum": sum(v.double().sum().item() for v in client_engine.state().values()),
        }


def test_the_base_is_partitioned_and_adapters_are_private(wide_base, tmp_path):
    results = run_clusters([4], storage_of, wide_base, tmp_path, "cluster")
    for seen in results:
        assert seen["whole"] > 4 * 4_000_000
        assert abs(seen["stored"] / (seen["whole"] / 4) - 1) < 0.02
        assert seen["groups"] == {seen["client"]} and seen["storage"]
    sums = [seen["sum"] for seen in results]
    assert sums[2] == sums[3], "the two ranks of a client train one adapter"
    assert len({sums[0], sums[1], sums[2]}) == 3, "different clients train different ones"


@pytest.mark.slow
def test_each_rank_may_keep_the_whole_base(wide_base, tmp_path):
    for seen in run_clusters([4], storage_of, wide_base, tmp_path, "rank"):
        assert abs(seen["stored"] / seen["whole"] - 1) < 0.02


def whose_adapters(rank, base, nvme, kind):
    """Return the ranks whose trained adapter (its masters, or their 16-bit copies) is found in the bytes of
    some tensor of this rank.
    """
    import gc

    with engine(base, kind, "bf16", clients=[(0,), (1,)], nvme=nvme) as client_engine:
        client_engine.load(client_engine.state())
        with client_engine.matched_passes(1, backward=True):
            client_engine.train_step([random_step(100 * rank, 2, 1, 1, 0)], LR)[0]
        trained = [
            value.flatten() for name, value in client_engine.state().items() if ".lora_B." in name
        ]  # A has the same start on all ranks
        marks = [
            value[:64].to(dtype).view(torch.uint8).numpy().tobytes()
            for value in trained
            for dtype in (torch.float32, torch.bfloat16)
        ]
        del trained
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage()
            for t in gc.get_objects()
            if torch.is_tensor(t) and t.numel() and t.device.type == "cpu"
        }
        storages |= {
            t.untyped_storage().data_ptr(): t.untyped_storage()
            for state in client_engine._states[0].ds_engine.optimizer.state.values()
            for t in state.values()
            if torch.is_tensor(t)
        }
        memory = b"".join(
            torch.tensor([], dtype=torch.uint8).set_(s).numpy().tobytes() for s in storages.values()
        )
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, marks)
        return {other for other, theirs in enumerate(everyone) if any(mark in memory for mark in theirs)}


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("zero0", "zero2", "cluster")), "zero3", "ram"],
)
def test_an_adapter_is_in_no_other_clients_memory(base, tmp_path, kind):
    assert run_clusters([2], whose_adapters, base, tmp_path, kind) == [{0}, {1}]


# Frozen tensors.


def freeze_half(rank, base, nvme, kind, dtype, *, targets):
    with engine(
        base,
        kind,
        dtype,
        adapter=AdapterConfig(targets=targets),
        train=TrainConfig(weight_decay=0.1, clip=1.0),
        nvme=nvme,
        gradient_clipping=1.0,
    ) as client_engine:
        start = drawn(client_engine.state())
        frozen = frozenset(filter(is_factor_a, start))
        client_engine.load(start, frozen=frozen)
        for i in range(3):
            client_engine.train_step([random_step(i, 2, 1)], 1e-2)[0]
        end = client_engine.state()
        return (
            max((end[n] - start[n]).abs().max().item() for n in frozen),
            min((end[n] - start[n]).abs().max().item() for n in start if n not in frozen),
        )


@pytest.mark.parametrize(
    "kind,dtype",
    [("zero0", "fp32"), ("zero0", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("ram", "bf16")],
)
def test_frozen_tensors_do_not_change(base, tmp_path, kind, dtype):
    [(frozen_delta, trained_delta)] = run_clusters(
        [1],
        freeze_half,
        base,
        tmp_path,
        kind,
        dtype,
        targets=("q_proj", "embed_tokens") if dtype == "fp32" else "all-linear",
    )
    assert frozen_delta == 0.0 and trained_delta > 1e-3

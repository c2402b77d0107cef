"""The engine against plain PyTorch, over every ZeRO stage and offload setting. Real DeepSpeed engines in real
processes.
"""

import os
import sysconfig

import pytest
import torch

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig
from fedspeed.models.factors import is_factor_a
from fedspeed.schedule.limits import QUANTISED
from tests.engine.engines import TIERS, ZERO, engine
from tests.limits import LIMIT_S
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama

LR = 1e-2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """4.3 M parameters, most of them in matrices far above the persistence threshold."""
    return write_llama(
        tmp_path_factory.mktemp("base") / "wide",
        hidden=256,
        intermediate=1024,
        layers=4,
        kv_heads=4,
        vocab=512,
    )


def drawn(state, scale=0.02, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(state[n].shape, generator=generator) * scale for n in sorted(state)}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


# One client, against a plain loop.


def plain_losses(base, steps, optimizer, adapter: AdapterConfig, micro=4):
    """Mean answer losses of an ordinary PyTorch + PEFT loop from the same start."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from fedspeed.models.adapters import initial_adapter, lora_config

    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter.method == "lora":
        model = get_peft_model(
            model,
            LoraConfig(
                r=adapter.lora_rank,
                lora_alpha=adapter.alpha,
                target_modules=lora_config(adapter, "llama").target_modules,
            ),
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(initial_adapter(name, parameter.shape, 0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(trained)
    model.train()
    losses = []
    for i in range(steps):
        step = random_step(i % 2, micro, 1)  # two batches in turn: something to learn
        ids = torch.from_numpy(step.micro[0].input_ids)
        labels = torch.from_numpy(step.micro[0].labels)
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def federated_losses(rank, base, kind, steps, adapter, *, train, micro, accumulation, ranks, nvme):
    with engine(base, kind, clients=[tuple(range(ranks))], adapter=adapter, train=train, nvme=nvme) as own:
        own.load(own.state())
        losses = []
        for i in range(steps):
            step = random_step(i % 2, micro, accumulation, ranks, own.groups.client_rank)
            losses.append(own.train_step([step], train.lr)[0].loss / step.step_answer_tokens)
        return losses


ADAMW = TrainConfig(lr=LR, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["zero0", "zero1", "zero2", "zero3", "resident", "ram", "nvme"])
def test_one_client_equals_a_plain_loop(base, tmp_path, kind):
    expected = plain_losses(
        base, 20, lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1), AdapterConfig(targets="all-linear")
    )
    [losses] = run_clusters(
        [1],
        federated_losses,
        base,
        kind,
        20,
        AdapterConfig(targets="all-linear"),
        train=ADAMW,
        micro=4,
        accumulation=1,
        ranks=1,
        nvme=tmp_path,
    )
    assert expected[-1] < expected[0] - 0.3, "the loop must learn, or equality shows nothing"
    assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-5


def test_lora_on_the_embedding_equals_a_plain_loop(base, tmp_path):
    """PEFT keeps its factors outside of any module that is called, where a partitioned tensor is easily met
    before it was gathered.
    """
    adapter = AdapterConfig(targets=("q_proj", "embed_tokens"))
    expected = plain_losses(base, 6, lambda p: torch.optim.SGD(p, lr=0.1), adapter)
    [losses] = run_clusters(
        [1],
        federated_losses,
        base,
        "zero3",
        6,
        adapter,
        train=TrainConfig(optimizer="sgd", lr=0.1),
        micro=4,
        accumulation=1,
        ranks=1,
        nvme=tmp_path,
    )
    assert expected[-2] < expected[0] - 0.02, "the loop must learn, or equality shows nothing"
    assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-5


def test_full_fine_tuning_equals_a_plain_loop(base, tmp_path):
    full = AdapterConfig(method="full")
    sgd = TrainConfig(lr=0.3, optimizer="sgd", momentum=0.9)
    expected = plain_losses(base, 20, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), full)
    [losses] = run_clusters(
        [1],
        federated_losses,
        base,
        "zero3",
        20,
        full,
        train=sgd,
        micro=4,
        accumulation=1,
        ranks=1,
        nvme=tmp_path,
    )
    assert expected[-1] < expected[0] - 0.1
    assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-5


@pytest.mark.parametrize(
    "kind",
    [
        "zero0",
        pytest.param("zero2", marks=pytest.mark.slow),
        "zero3",
        "ram",
        pytest.param("client", marks=pytest.mark.slow),
        "cluster",
    ],
)
def test_two_ranks_a_client_equal_one_rank_with_twice_the_batch(base, tmp_path, kind):
    """And accumulation is the same step again: 2 ranks x 2 micro-batches x 1 row = 1 rank x 4 rows. Answers
    fall unevenly on the ranks.
    """
    adapter = AdapterConfig(targets="all-linear")
    one, two, four = (
        run_clusters(
            [ranks],
            federated_losses,
            base,
            kind,
            10,
            adapter,
            train=ADAMW,
            micro=micro,
            accumulation=accumulation,
            ranks=ranks,
            nvme=tmp_path / str(ranks),
        )
        for micro, accumulation, ranks in ((4, 1, 1), (2, 1, 2), (1, 2, 2))
    )
    for ranks in (two, four):
        together = [sum(parts) for parts in zip(*ranks)]
        assert max(abs(a - b) for a, b in zip(together, one[0])) < 1e-5


# The aggregate arrives, and stays.


def aggregate_then_lr_zero(rank, base, nvme, kinds, dtypes, *, clients, adapter):
    """Largest differences from the aggregate, of the masters and of the working copies, per (kind, dtype)."""
    from fedspeed.engine.world import join_world, leave_world

    join_world(LIMIT_S)
    out = {}
    for kind in kinds:
        for dtype in dtypes:
            train = TrainConfig(weight_decay=0.1)
            with engine(
                base,
                kind,
                dtype,
                clients=clients,
                nvme=nvme / kind / dtype,
                adapter=adapter,
                train=train,
                join=False,
            ) as own:
                size = own.groups.client_size
                mine = own.groups.client_rank
                aggregate = drawn(own.state())
                own.load(aggregate)
                before = own.evaluate([random_step(9, 2, 1).micro])[0].loss
                for i in range(3):  # momentum and bias correction exist, and masters moved away
                    own.train_step([random_step(10 * rank + i, 2, 2, size, mine)], 1e-2)[0]
                moved = largest_difference(own.state(), aggregate)
                kept = own.optimizer_state()
                own.load(aggregate)
                reset = max(v.abs().max().item() for v in own.optimizer_state().values())
                own.train_step([random_step(7, 2, 2, size, mine)], 0.0)[0]
                masters = largest_difference(own.state(), aggregate)
                after = own.evaluate([random_step(9, 2, 1).micro])[0].loss
                own.load(aggregate, kept)
                restored = largest_difference(own.optimizer_state(), kept)
                out[kind, dtype] = {
                    "masters": masters,
                    "copies": abs(after - before),
                    "moved": moved,
                    "reset": reset,
                    "restored": restored,
                    "state": max(v.abs().max().item() for v in kept.values()),
                }
    leave_world()
    return out


def check(results):
    for result in results:
        for case, seen in result.items():
            assert seen["masters"] == 0.0, (case, seen)
            assert seen["copies"] == 0.0, (case, seen)
            assert seen["moved"] > 1e-3, (case, "training must have moved the masters away first")
            assert seen["reset"] == 0.0 and seen["restored"] == 0.0 and seen["state"] > 0.0, (case, seen)


IN_MEMORY = [kind for kind in ZERO if "nvme" not in kind]
ON_NVME = [kind for kind in ZERO if "nvme" in kind]
needs_aio = pytest.mark.skipif(
    not (
        os.path.exists("/usr/include/libaio.h")
        and os.path.exists(f"{sysconfig.get_paths()['include']}/Python.h")
    ),
    reason="NVMe offload needs libaio-dev and python3-dev",
)


@pytest.mark.parametrize(
    ("clients", "dtypes"),
    [
        pytest.param([(0, 1)], ["bf16"], id="one client of two ranks"),
        pytest.param([(0,), (1,)], ["fp32"], id="two clients in fp32", marks=pytest.mark.slow),
        pytest.param([(0, 1)], ["fp32"], id="one client of two ranks in fp32", marks=pytest.mark.slow),
        pytest.param([(0,), (1,)], ["bf16"], id="two clients", marks=pytest.mark.slow),
    ],
)
def test_every_client_holds_the_aggregate(base, tmp_path, clients, dtypes):
    kinds = [*IN_MEMORY, *(tier for tier in TIERS if tier not in QUANTISED)]
    check(
        run_clusters(
            [2],
            aggregate_then_lr_zero,
            base,
            tmp_path,
            kinds,
            dtypes,
            clients=clients,
            adapter=AdapterConfig(targets="all-linear"),
        )
    )


@needs_aio
# it builds DeepSpeed's operator first: six minutes of a core, more where others are at work
@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT_S)
def test_every_client_holds_the_aggregate_with_nvme(tmp_path):
    """DeepSpeed keeps tensors under 1 MiB off NVMe, so this model trains matrices that are larger, in bf16
    too.
    """
    base = write_llama(tmp_path / "llama", hidden=256, intermediate=2048, layers=2, kv_heads=4)
    check(
        run_clusters(
            [1],
            aggregate_then_lr_zero,
            base,
            tmp_path,
            ON_NVME,
            ["fp32", "bf16"],
            clients=[(0,)],
            adapter=AdapterConfig(method="full"),
            timeout=4 * LIMIT_S,
        )
    )
    for kind, files in (
        ("zero3-nvme-optimizer", "optimizer"),
        ("zero3-nvme-base", "params"),
        ("zero3-nvme", "params"),
    ):
        for dtype in ("fp32", "bf16"):
            swapped = [
                p
                for p in (tmp_path / kind / dtype).rglob("*.swp")
                if files in str(p) and p.stat().st_size >= 2**20
            ]
            assert swapped, f"{kind} {dtype}: nothing was large enough to be offloaded"


def test_every_client_holds_the_aggregate_in_fp16(base, tmp_path):
    check(
        run_clusters(
            [1],
            aggregate_then_lr_zero,
            base,
            tmp_path,
            ["zero0", "zero2", "zero3", "ram"],
            ["fp16"],
            clients=[(0,)],
            adapter=AdapterConfig(targets="all-linear"),
        )
    )


# Who holds what.


def holdings(rank, base, nvme, partition):
    """(bytes of the frozen base on this rank, adapter checksum after a step of its own, adapter bytes that
    other clients could gather).
    """
    with engine(
        base, "zero3", clients=[(0,), (1,), (2, 3)], nvme=nvme, options=EngineConfig(base_partition=partition)
    ) as own:
        frozen = [p for p in own.model.parameters() if not p.requires_grad]
        trained = [p for p in own.model.parameters() if p.requires_grad]
        held = sum(
            (p.ds_tensor.numel() + p.numel()) * p.element_size() for p in frozen
        )  # p itself holds nothing between passes
        whole = sum(p.ds_numel * p.element_size() for p in frozen)
        own.load(own.state())
        steps = 1 + own.groups.client_ranks[0] % 2  # different numbers of steps on the ranks of one cluster
        with own.matched_passes(steps, backward=True):
            for i in range(steps):
                own.train_step(
                    [
                        random_step(
                            100 * own.groups.client_ranks[0] + i,
                            2,
                            1,
                            own.groups.client_size,
                            own.groups.client_rank,
                        )
                    ],
                    LR,
                )[0]
        held = max(held, sum((p.ds_tensor.numel() + p.numel()) * p.element_size() for p in frozen))
        # after load, reading the masters is a collective over the client alone: nobody else may be needed for
        # it
        return {
            "held": held,
            "whole": whole,
            "groups": {p.ds_zero_partition_world_size for p in trained},
            "client": own.groups.client_size,
            "storage": {id(p.ds_process_group) for p in trained} == {id(own.groups.client)},
            "sum": sum(v.double().sum().item() for v in own.state().values()),
        }


def test_the_base_is_partitioned_and_adapters_are_private(wide_base, tmp_path):
    results = run_clusters([4], holdings, wide_base, tmp_path, "cluster")
    for seen in results:
        assert seen["whole"] > 4 * 4_000_000
        assert abs(seen["held"] / (seen["whole"] / 4) - 1) < 0.02
        assert seen["groups"] == {seen["client"]} and seen["storage"]
    sums = [seen["sum"] for seen in results]
    assert sums[2] == sums[3], "the two ranks of a client train one adapter"
    assert len({sums[0], sums[1], sums[2]}) == 3, "different clients train different ones"


def test_each_rank_may_keep_the_whole_base(wide_base, tmp_path):
    for seen in run_clusters([4], holdings, wide_base, tmp_path, "rank"):
        assert abs(seen["held"] / seen["whole"] - 1) < 0.02


def whose_adapters(rank, base, nvme, kind):
    """Ranks whose trained adapter (its masters, or their 16-bit copies) lies in some tensor of this rank's
    memory, by its bytes.
    """
    import gc

    import torch

    with engine(base, kind, "bf16", clients=[(0,), (1,)], nvme=nvme) as own:
        own.load(own.state())
        with own.matched_passes(1, backward=True):
            own.train_step([random_step(100 * rank, 2, 1, 1, 0)], LR)[0]
        trained = [
            value.flatten() for name, value in own.state().items() if ".lora_B." in name
        ]  # A starts alike everywhere
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
            for state in own._states[0].ds_engine.optimizer.state.values()
            for t in state.values()
            if torch.is_tensor(t)
        }
        memory = b"".join(
            torch.tensor([], dtype=torch.uint8).set_(s).numpy().tobytes() for s in storages.values()
        )
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, marks)
        return {other for other, theirs in enumerate(everyone) if any(mark in memory for mark in theirs)}


@pytest.mark.parametrize("kind", ["zero0", "zero2", "zero3", "ram", "cluster"])
def test_an_adapter_is_in_no_other_clients_memory(base, tmp_path, kind):
    assert run_clusters([2], whose_adapters, base, tmp_path, kind) == [{0}, {1}]


# Holding still.


def hold_half(rank, base, nvme, kind, dtype, *, targets):
    with engine(
        base,
        kind,
        dtype,
        adapter=AdapterConfig(targets=targets),
        train=TrainConfig(weight_decay=0.1, clip=1.0),
        nvme=nvme,
        gradient_clipping=1.0,
    ) as own:
        start = drawn(own.state())
        held = frozenset(filter(is_factor_a, start))
        own.load(start, frozen=held)
        for i in range(3):
            own.train_step([random_step(i, 2, 1)], 1e-2)[0]
        end = own.state()
        return (
            max((end[n] - start[n]).abs().max().item() for n in held),
            min((end[n] - start[n]).abs().max().item() for n in start if n not in held),
        )


@pytest.mark.parametrize(
    "kind,dtype",
    [("zero0", "fp32"), ("zero0", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("ram", "bf16")],
)
def test_held_tensors_do_not_move(base, tmp_path, kind, dtype):
    [(held, trained)] = run_clusters(
        [1],
        hold_half,
        base,
        tmp_path,
        kind,
        dtype,
        targets=("q_proj", "embed_tokens") if dtype == "fp32" else "all-linear",
    )
    assert held == 0.0 and trained > 1e-3

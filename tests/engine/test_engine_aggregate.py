"""The aggregate of a round reaches the masters and the working copies of every client, with every ZeRO stage
and offload setting.
"""

import os
import sysconfig

import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.models.config import AdapterConfig
from fedspeed.schedule.limits import QUANTISED
from tests.engine.engines import TIERS, ZERO, engine
from tests.engine.small_models import drawn, largest_difference
from tests.limits import LIMIT_S
from tests.processes import run_clusters
from tests.tiny import random_step, write_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("base") / "llama")


def aggregate_then_lr_zero(rank, base, nvme, kinds, dtypes, *, clients, adapter):
    """Return by (kind, dtype) the largest differences of masters and working copies from the aggregate."""
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
            ) as client_engine:
                size = client_engine.groups.client_size
                mine = client_engine.groups.client_rank
                aggregate = drawn(client_engine.state())
                client_engine.load(aggregate)
                before = client_engine.evaluate([random_step(9, 2, 1).micro])[0].loss
                for i in range(3):  # momentum and bias correction exist, and masters have left the aggregate
                    client_engine.train_step([random_step(10 * rank + i, 2, 2, size, mine)], 1e-2)[0]
                delta = largest_difference(client_engine.state(), aggregate)
                kept = client_engine.optimizer_state()
                client_engine.load(aggregate)
                reset = max(v.abs().max().item() for v in client_engine.optimizer_state().values())
                client_engine.train_step([random_step(7, 2, 2, size, mine)], 0.0)[0]
                masters = largest_difference(client_engine.state(), aggregate)
                after = client_engine.evaluate([random_step(9, 2, 1).micro])[0].loss
                client_engine.load(aggregate, kept)
                restored = largest_difference(client_engine.optimizer_state(), kept)
                out[kind, dtype] = {
                    "masters": masters,
                    "copies": abs(after - before),
                    "delta": delta,
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
            assert seen["delta"] > 1e-3, (case, "training must have changed the masters first")
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
        pytest.param([(0, 1)], ["bf16"], id="one client of two ranks", marks=pytest.mark.slow),
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
# builds DeepSpeed's operator first, which takes six minutes of a core
@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT_S)
def test_every_client_holds_the_aggregate_with_nvme(tmp_path):
    """DeepSpeed keeps tensors below 1 MiB off NVMe, so this model trains larger matrices, in bf16 too."""
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


@pytest.mark.slow
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

"""Ranks that share a GPU by mistake, and devices whose memory is full."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fedspeed.cli import main
from fedspeed.cluster.gpus import Gpu
from fedspeed.cluster.hostfile import Host
from fedspeed.config.load import load
from fedspeed.errors import EXIT_USAGE, FedSpeedError, LostPeerError
from fedspeed.session import components, hosts, shared_gpus
from fedspeed.session.explain import as_user_error
from tests.run.launched import COLD, headline, records
from tests.run.meeting import meet

GPU_OF_RANK = "fedspeed.engine.device_types.gpu_of_rank"
FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.75 GiB of which 1.25 "
    "GiB is free. Including non-PyTorch memory, this process has 9.48 GiB memory in use. Of the allocated"
)


def order(*arguments: str) -> SimpleNamespace:
    config = load(None, ["model.base=m", "data.clients=3", *arguments]).config
    return SimpleNamespace(config=config, deepspeed=dict(config.deepspeed))


def agreed(job, store):
    shared_gpus.publish_gpu(job, store)
    return shared_gpus.check_shared_gpus(job, store)


def test_all_ranks_refuse_two_of_a_cluster_on_one_card(monkeypatch):
    gpus = ["GPU-1", "GPU-2", "GPU-1"]
    monkeypatch.setattr(GPU_OF_RANK, lambda local_rank: Gpu(gpus[local_rank], "alpha", 1))
    message = {str(one) for one in meet(order(), 3, agreed)}
    assert (
        len(message) == 1
        and "host alpha: ranks 0 and 2 of cluster default would compute on one GPU (GPU-1;" in message.pop()
    )


def test_clusters_of_one_rank_share_a_card(monkeypatch):
    monkeypatch.setattr(GPU_OF_RANK, lambda local_rank: Gpu("GPU-1", "alpha", 1))
    clusters = tuple(Host(name, 1, cluster=name) for name in "abc")
    found = meet(order(), 3, agreed, clusters)
    assert found[0] == found[1] == found[2]
    [note], sharers = found[0]
    assert note.startswith("ranks 0, 1 and 2 share GPU-1 of alpha")
    assert sharers == 3


@pytest.mark.parametrize(
    "value", ["", '"5"', "[]", "null}", '{"name": 1, "host": 2, "seen": "x"', "[" * 100_000]
)
@pytest.mark.parametrize("key", ["gpu/", "gpus/", "read by/"])
def test_a_malformed_value_in_the_store_ends_with_a_message(monkeypatch, key, value):
    monkeypatch.setattr(GPU_OF_RANK, lambda local_rank: None)

    def checked(job, store):
        real = store.get
        garbled = SimpleNamespace(
            put=store.put,
            try_put=store.try_put,
            wait=store.wait,
            get=lambda *keys: [value if name.startswith(key) else real(name)[0] for name in keys],
        )
        agreed(job, garbled)
        hosts.check_hosts(job, garbled)

    two = (Host("alpha", 2), Host("beta", 1))
    for error in meet(order(), 3, checked, two):
        assert isinstance(error, LostPeerError) and f"`{key}" in str(error)


def test_ranks_that_see_a_card_each_and_ranks_without_any_pass(monkeypatch):
    monkeypatch.setattr(
        GPU_OF_RANK, lambda local_rank: Gpu(f"GPU-{local_rank}", "alpha") if local_rank else None
    )
    assert meet(order(), 3, agreed) == [([], 3), ([], 1), ([], 1)]


def test_too_many_ranks_are_refused_before_they_are_started(workshop, monkeypatch, capsys):
    monkeypatch.setattr("fedspeed.cluster.checks.computing_gpus", lambda env: 1)
    assert main(["run", "--config", str(workshop.config), "--dry-run"]) == EXIT_USAGE
    assert (
        "ranks 0 and 1 of cluster default would compute on one GPU (GPU 0; a rank there sees 1 GPU)"
        in capsys.readouterr().err
    )


# A device that is full.


def job_of(*arguments: str) -> SimpleNamespace:
    asked = order(*arguments)
    return SimpleNamespace(
        request=asked,
        config=asked.config,
        world_rank=0,
        is_server=False,
        describe=lambda rank: f"client 0 (rank {rank} on alpha)",
    )


def test_a_full_device_is_reported_as_that_with_what_to_set():
    message = as_user_error(
        FULL,
        job_of(
            "engine.tier=ram",
            "train.micro_batch=4",
            "train.accumulation=2",
            "engine.block_slots=6",
            "data.max_tokens=512",
        ),
    )
    text = str(message)
    assert isinstance(message, FedSpeedError) and message.exit_code == EXIT_USAGE
    assert text.startswith(
        "client 0 (rank 0 on alpha): the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 "
        "GiB. GPU 0 has a total "
        "capacity of 10.75 GiB of which 1.25 GiB is free). Set"
    )
    assert (
        "engine.activation_gib=0, engine.block_inputs=host, engine.block_slots=2, train.micro_batch=2 with "
        "train.accumulation=4 (the same step), "
        "engine.client_slots=1, data.max_tokens=256"
    ) in text
    assert "`fedspeed plan" in text and "RAM" not in text and "ulimit" not in text


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (
            ("engine.tier=stock", "train.micro_batch=3"),
            "engine.activation_checkpointing=true, train.micro_batch=1, engine.tier=ram, data.max_tokens=",
        ),
        (
            (
                "engine.tier=nf4",
                "engine.activation_gib=0",
                "engine.block_inputs=host",
                "train.micro_batch=1",
                "engine.client_slots=1",
            ),
            "engine.tier=ram, data",
        ),
        (
            ("adapter.method=full", "engine.activation_checkpointing=true", "train.micro_batch=1"),
            "data.max_tokens=",
        ),
        (
            (
                "engine.pipeline=client",
                "engine.activation_checkpointing=true",
                "train.micro_batch=2",
                "train.accumulation=1",
            ),
            "train.micro_batch=1 with",
        ),
    ],
)
def test_only_what_can_be_lowered_is_named(arguments, first):
    text = str(as_user_error(FULL, job_of(*arguments)))
    assert text.partition("the mildest first: ")[2].startswith(first), text


def test_out_of_memory_errors_of_cuda_and_cublas_are_recognised():
    for said in (
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert "the GPU's memory is full" in str(as_user_error(RuntimeError(said), job_of()))
    other = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    assert as_user_error(other, job_of()) is other


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (FULL, torch.OutOfMemoryError, "CUDA out of memory"),
        (MemoryError("no more"), FedSpeedError, "ulimit -v, the scheduler's --mem"),
    ],
)
def test_a_full_device_is_no_lack_of_ram_while_loading(monkeypatch, error, raised, text):
    """The error passes on to the place that reports a full device."""

    def build(*_):
        raise error

    monkeypatch.setattr("fedspeed.engine.build.build_engine", build)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("LOCAL_SIZE", "1")
    job = job_of()
    job.topology = SimpleNamespace(clients=())
    job.place = SimpleNamespace(clients=(0,))
    job.world = (0,)
    monkeypatch.setattr(components, "swap_folder", lambda job: None)
    with pytest.raises(raised, match=text):
        components.make_engine(job, None, 1)


def test_a_run_whose_device_is_full_ends_with_what_to_set(workshop):
    """The message comes once, with a report, and without a restart that would end the same way."""
    ended = workshop.run("run.name=full", env={"TEST_FULL": str(FULL)})
    assert ended.code == EXIT_USAGE, ended.text
    assert ended.err.count("the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB.") == 1
    assert "Traceback" not in ended.err and "starting all ranks again" not in ended.err
    assert (
        "failed" in headline(workshop.runs / "full")
        and "engine.tier=ram" in (workshop.runs / "full" / "report.md").read_text()
    )


# A machine with GPUs may lack what other runs need.


@pytest.mark.slow
def test_a_plain_run_needs_no_cryptography(workshop):
    """It also runs under engine.deterministic, which makes torch refuse some operations."""
    ended = workshop.finish_run(
        "run.name=plain",
        "federation.rounds=1",
        "engine.deterministic=true",
        launcher=COLD,
        env={"TEST_LACKS": "cryptography"},
    )
    assert len(records(workshop.runs / "plain")) == 2, ended.text


def test_a_masked_run_without_cryptography_is_refused_before_it_starts(workshop, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    arguments = ["routing.mode=mix+mask", "federation.local_optimizer=reset", "cluster.local_ranks=3"]
    assert main(["run", "--config", str(workshop.config), "--dry-run", *arguments]) == EXIT_USAGE
    assert (
        "routing.mode=mix+mask needs the package cryptography, which is not installed"
        in capsys.readouterr().err
    )
    arguments = ["routing.mode=plain", "federation.method={name: fate_llm}"]
    assert main(["run", "--config", str(workshop.config), "--dry-run", *arguments]) == EXIT_USAGE
    assert (
        "federation.method.secure_sum=native needs the package cryptography, which is not installed"
        in capsys.readouterr().err
    )

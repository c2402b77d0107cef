"""Each rank publishes its GPU before anything is built, and all ranks check which of them share one."""

import json
from dataclasses import asdict

from fedspeed.cluster.gpus import Gpu, check_gpus
from fedspeed.cluster.rendezvous import Store
from fedspeed.cluster.store_values import read_values
from fedspeed.engine import device_types
from fedspeed.session.coordination import CheckIn
from fedspeed.session.request import Job


def may_share_gpus(job: Job) -> bool:
    """Return whether there are several working ranks, which could share a GPU."""
    return len(job.workers) > 1


def publish_gpu(job: Job, store: Store) -> None:
    """Publish the GPU that this rank computes on. Collective over the required ranks."""
    if not may_share_gpus(job):
        return
    with CheckIn(job, store, "gpus"):
        gpu = device_types.gpu_of_rank(job.launch.local_rank)
        store.put(_key(job.world_rank), json.dumps(asdict(gpu) if gpu else None))


def check_shared_gpus(job: Job, store: Store) -> tuple[list[str], int]:
    """Compare the published GPUs with the planned torch worlds. The result is the same on all ranks.

    Returns:
        (a remark for each GPU that several torch worlds share, number of ranks on this rank's device).

    Raises:
        ConfigError: two ranks of one torch world would compute on one GPU.
    """
    if not may_share_gpus(job):
        return [], 1
    published = read_values(store, map(_key, job.workers), _gpu)
    gpus = {rank: gpu for rank, gpu in zip(job.workers, published, strict=True) if gpu}
    notes = check_gpus(job.topology.worlds(job.config.engine.pipeline), gpus)
    if job.world_rank not in gpus:  # it computes on the CPUs of its host, as do all other ranks there
        return notes, sum(job.topology.placement(rank).host == job.place.host for rank in job.workers)
    return notes, list(gpus.values()).count(gpus[job.world_rank])


def _gpu(text: str) -> Gpu | None:
    values = json.loads(text)
    return None if values is None else Gpu(str(values["name"]), str(values["host"]), int(values["seen"]))


def _key(rank: int) -> str:
    return f"gpu/{rank}"

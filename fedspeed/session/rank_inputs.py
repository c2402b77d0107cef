"""Reading and checking of a rank's inputs, before all ranks agree to start."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedspeed.checkpoint.journal import Entry
from fedspeed.cluster import rendezvous
from fedspeed.cluster.checks import check_clusters
from fedspeed.data.clients import ClientData, ClientRows, client_rows, encode_client, largest_id
from fedspeed.data.eval_task import EvalTask
from fedspeed.data.public import public_data
from fedspeed.engine.device_types import check_dtype
from fedspeed.federation.checks import check_weight
from fedspeed.log import LOG
from fedspeed.models.tokenizer import check_ids, load_tokenizer
from fedspeed.session import preflight, resume, shared_gpus
from fedspeed.session.coordination import CheckIn
from fedspeed.session.eval_request import round_tasks
from fedspeed.session.hosts import check_hosts, publish_digests, several_hosts
from fedspeed.session.input_digests import check_inputs
from fedspeed.session.request import Job


@dataclass(frozen=True)
class Inputs:
    """Hold the inputs that a rank has read.

    Attributes:
        tokenizer: a transformers tokenizer.
        all_clients: rows of all clients; empty on a rank of the server.
        data: encoded rows of this rank's clients, by client.
        entry: the newest entry of the journal, on the reporting rank, if there is one.
        sharers: number of ranks that compute on this rank's device.
        public: encoded rows that the server trains on, on its ranks; None elsewhere.
        eval_tasks: evaluation tasks of the run with their items; none on a rank of the server.
    """

    tokenizer: Any
    all_clients: list[ClientRows]
    data: dict[int, ClientData]
    entry: Entry | None
    sharers: int
    public: ClientData | None = None
    eval_tasks: Sequence[tuple[EvalTask, Sequence[Any]]] = ()


def read_inputs(job: Job, store: rendezvous.Store, lock: resume.RunLock, is_original_dtype: bool) -> Inputs:
    """Read and check the inputs of this rank; return once all ranks have. Collective over the required ranks.

    Args:
        is_original_dtype: whether the numeric type is that of an earlier start of this run, and not named in
            the configuration.

    Raises:
        FedSpeedError: inputs of this rank, or of another one, are wrong.
    """
    request = job.request
    with CheckIn(job, store, "ready"):
        inputs, remarks = _read(job, store, lock, is_original_dtype)
    if several_hosts(job):
        with CheckIn(job, store, "inputs"):
            check_hosts(job, store)
    if job.reporter:
        for text in remarks:
            LOG.info(text)
    if request.fresh:
        with CheckIn(job, store, "fresh"):
            if job.reporter:
                request.move_aside()
    return inputs


def _read(
    job: Job, store: rendezvous.Store, lock: resume.RunLock, is_original_dtype: bool
) -> tuple[Inputs, list[str]]:
    """Read the inputs of this rank; return them with remarks for the user."""
    from fedspeed.engine.arithmetic import check_arithmetic

    request = job.request
    config = job.config
    local_rank = job.launch.local_rank
    _check_plan(job)
    remarks, sharers = shared_gpus.check_shared_gpus(job, store)
    check_dtype(config.model.dtype, str(request.folder) if is_original_dtype else "", local_rank)
    check_arithmetic(config.engine.matmul, config.engine.deterministic, local_rank)
    tokenizer = load_tokenizer(config.model)
    all_clients = [] if job.is_server else client_rows(config.data, config.run.seed)
    data = {c: encode_client(all_clients[c], tokenizer, config.data) for c in job.place.clients}
    check_weight(config, sum(client.weight for client in data.values()))
    public = None
    if job.is_server and config.federation.public_rows:
        public = public_data(config.federation.public_rows, config.data, tokenizer)
    read = [*data.values(), *([public] if public else [])]
    check_ids(max(map(largest_id, read), default=0), config.model)
    remarks = [*remarks, *preflight.start_notes(request.loaded)]
    entry = None
    if job.reporter:
        entry, found = _read_journal(job, lock, all_clients)
        remarks += found
    if several_hosts(job):
        publish_digests(job, store, all_clients)
    inputs = Inputs(
        tokenizer,
        all_clients,
        data,
        entry=entry,
        sharers=sharers,
        public=public,
        eval_tasks=() if job.is_server else round_tasks(config),
    )
    return inputs, remarks


def _check_plan(job: Job) -> None:
    """Check the files of this host, and the configuration against the topology.

    Raises:
        FedSpeedError: a file or a setting is wrong.
    """
    request = job.request
    preflight.check_files(request.loaded)
    check_clusters(job.config, job.topology)
    preflight.check_plan(request.config, request.deepspeed, job.topology, job.launch.hostfile)


def _read_journal(
    job: Job, lock: resume.RunLock, all_clients: list[ClientRows]
) -> tuple[Entry | None, list[str]]:
    """Lock the run's folder; return the newest entry of its journal, and remarks about its inputs.

    Raises:
        FedSpeedError: the run cannot be resumed with this configuration and these inputs.
    """
    request = job.request
    if request.folder.is_dir():
        lock.take(request.folder)
    if request.fresh:
        return None, []
    job.deployment.check_epoch(request.folder)
    journal = resume.journal_of(request)
    entry = resume.journal_entry(journal, request)
    if entry is None:
        return None, []
    remarks = check_inputs(journal, entry, job.config, all_clients)
    resume.check_best(journal, entry)
    return entry, remarks

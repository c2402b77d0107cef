"""`--dry-run`: all checks of a run, without starting a rank, reading weights or writing a file."""

import warnings

from fedspeed.cluster.discover import from_process
from fedspeed.cluster.local_ranks import local_hosts
from fedspeed.errors import FedSpeedError, ModelError
from fedspeed.models.checks import local_base
from fedspeed.session import preflight
from fedspeed.session.client_ranks import with_client_ranks
from fedspeed.session.deployment import deployment_of
from fedspeed.session.input_digests import check_inputs, rows_without_libraries
from fedspeed.session.local_run import complete
from fedspeed.session.numeric_type import predict
from fedspeed.session.request import RunRequest
from fedspeed.session.resume import RunLock, check_best, journal_entry, journal_of


def dry_run(request: RunRequest) -> str:
    """Return a description of the run in a few lines.

    Raises:
        FedSpeedError: the run would be refused.
    """
    text = preflight.check(request.loaded, request.hostfile)
    request, dtype = predict(request)
    text += f"\ndtype    {dtype}" if dtype else ""
    request, ranks = _with_client_ranks(request)
    text += f"\nranks    {ranks}" if ranks else ""
    inner = request
    if request.config.model.dtype == "auto":
        inner = request.with_dtype("fp32")  # the largest type; the model is built without memory
        try:
            preflight.check_files(inner.loaded)
        except FedSpeedError as error:
            text += f"\nnote     if it is resolved to fp32: {error}"
    elif dtype:
        preflight.check_files(request.loaded)  # again, as the ranks do: `check` did not know the type
    if request.folder.is_dir():
        lock = RunLock()
        lock.take(request.folder)
        lock.release()
        if not request.fresh:
            deployment_of(request.config).check_epoch(request.folder)
        if not request.fresh and (entry := journal_entry(journal_of(request), request)):
            rows = rows_without_libraries(request.config)
            notes = check_inputs(journal_of(request), entry, request.config, rows)
            text += "".join(f"\nnote     {note}" for note in notes)
            if summary := complete(request, entry):
                text += f"\njournal  {request.folder} is complete ({summary.status}, {entry.round} rounds)"
            else:
                check_best(journal_of(request), entry)
                text += f"\njournal  goes on after round {entry.round} in {request.folder}"
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(action="ignore"):  # libraries warn about themselves
        inside = preflight.look_inside(inner.loaded, request.hostfile)
    return "\n".join(filter(None, (text, inside)))


def _with_client_ranks(request: RunRequest) -> tuple[RunRequest, str]:
    """Resolve adapter.rank_by_client=auto as the ranks will, where what decides is known already.

    Returns:
        the request, and the ranks as text; empty where all clients have adapter.lora_rank.
    """
    config = request.config
    if config.adapter.rank_by_client == "auto" and config.model.dtype == "auto":
        return request, "adapter.rank_by_client=auto: decided after model.dtype, when the ranks meet"
    launch = from_process(request.hostfile)
    local = launch.kind == "none"
    hosts = (
        local_hosts(launch, config.cluster.local_ranks, config.data.clients, server=config.has_server)
        if local
        else launch.hosts
    )
    try:
        return with_client_ranks(request, hosts)
    except ModelError as error:
        if local_base(config) is not None:
            raise
        return request, f"adapter.rank_by_client=auto: decided when the base is here ({error})"

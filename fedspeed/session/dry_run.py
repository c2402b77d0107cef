"""`--dry-run`: all checks of a run, without starting a rank, reading weights or writing a file."""

import warnings

from fedspeed.errors import FedSpeedError
from fedspeed.session import preflight
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

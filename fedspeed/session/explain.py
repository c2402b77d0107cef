"""Errors of the system and of libraries, translated into messages with a remedy for the user."""

import errno

from fedspeed.engine.base.placement import choose_tier
from fedspeed.engine.world import lost_connection
from fedspeed.errors import FedSpeedError, LostPeerError, connection_text
from fedspeed.session.device_memory import device_memory_text, out_of_device_memory
from fedspeed.session.request import Job

FILE_ERRORS = (  # of a file or folder that cannot be written
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EIO,
    errno.ESTALE,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
RESUME_REMEDY = "the same command resumes from the journal"


def as_user_error(error: BaseException, job: Job) -> BaseException:
    """Translate a full disk, full device memory or a lost connection; return any other error unchanged."""
    if isinstance(error, FedSpeedError):
        return error
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        return FedSpeedError(
            f"{error.filename or job.request.folder}: cannot be written ({error.strerror}); make room "
            "there or choose another place (run.out=FOLDER), and the same command goes on from the last "
            "round in the journal"
        )
    if out_of_device_memory(error):
        return FedSpeedError(device_memory_text(error, job.describe(job.world_rank), job.config, _tier(job)))
    if not isinstance(error, Exception) or not lost_connection(error):
        return error
    return LostPeerError(f"a rank of this cluster was lost: {connection_text(error)}", remedy=RESUME_REMEDY)


def lost_ranks_error(job: Job, lost: tuple[int, ...]) -> LostPeerError:
    """Return the error for ranks whose heartbeat has stopped."""
    names = ", ".join(job.describe(rank) for rank in lost)
    have = "has" if len(lost) == 1 else "have"
    return LostPeerError(
        f"{names} {have} been silent for {job.config.cluster.heartbeat_timeout_s:g} s", remedy=RESUME_REMEDY
    )


def out_of_memory(error: Exception) -> bool:
    """Return whether an error of Python, the system or torch's CPU allocator means that RAM is exhausted.

    Exhausted device memory is reported by `as_user_error`.
    """
    if out_of_device_memory(error):
        return False
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    signs = ("can't allocate memory", "can't start new thread", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _tier(job: Job) -> str:
    """Return the tier that engine.tier resolves to by the configuration alone; empty for a pipeline."""
    config = job.config
    if config.engine.pipeline != "none":
        return ""
    return choose_tier(config.engine, job.request.deepspeed, config.adapter.method != "full")

"""Resolution of the values `auto` that depend on the hosts of a run, once for all its ranks."""

from dataclasses import dataclass

from fedspeed.cluster.rendezvous import Store
from fedspeed.session import numeric_type
from fedspeed.session.client_ranks import with_client_ranks
from fedspeed.session.request import Job


@dataclass(frozen=True)
class Resolved:
    """A job whose model.dtype and adapter.rank_by_client are resolved.

    Attributes:
        job: with the values in its configuration.
        texts: what they are, for the reporting rank to print; none of values that are not resolved.
        is_original_dtype: whether the numeric type is that of an earlier start of the same run.
    """

    job: Job
    texts: list[str]
    is_original_dtype: bool


def resolve(job: Job, store: Store) -> Resolved:
    """Resolve the values of a job. Collective over the required ranks.

    Raises:
        PlanError: see `with_client_ranks`.
    """
    decided = numeric_type.agree(job, store)
    job = decided.job
    request, ranks = with_client_ranks(job.request, job.launch.hosts)
    texts = [decided.text, f"LoRA ranks: {ranks}" if ranks else ""]
    return Resolved(
        job if request is job.request else Job(request, job.launch, job.topology),
        [text for text in texts if text],
        decided.resumed,
    )

"""How a session ends: the export and the report of a run that went well, the report of one that did not, and errors told as what they are."""

import contextlib
import errno
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from fedspeed import activity
from fedspeed.cluster.once import report
from fedspeed.cluster.rendezvous import Store
from fedspeed.config.run import RunConfig
from fedspeed.engine.base.choose import choose_tier
from fedspeed.engine.base.told import execution
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE, FedSpeedError, LostPeerError, Preempted, connection_text
from fedspeed.models.checks import weight_notes
from fedspeed.models.saved_adapter import outside_blocks
from fedspeed.monitor import stdout
from fedspeed.session.order import Job
from fedspeed.session.remedies import device_memory_text, out_of_device_memory
from fedspeed.session.standing import journal_of
from fedspeed.units import loss_text

TOLD = "refusal told"  # the key that says so
TOLD_S = 30.0  # for the first to know to say it; then another one does
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ESTALE,
                errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
ASKED_FILE = ".asked-to-end"  # in a run's folder: what the reporter was at then


def finish(job: Job, progress, monitor, engine, tokenizer, comparison, predicted=None, renewed: bool = False) -> int:
    """The reporter's part after the last round, or after the one in which the run was asked to end: export, report, and the exit code, which
    is 0 only if every update of every round counted."""
    from fedspeed.checkpoint.card import Card
    from fedspeed.checkpoint.export import export, lasting_name
    from fedspeed.data.usage import PromptFormat
    from fedspeed.monitor.report import Export

    config, folder = job.config, job.order.folder
    if not progress.done:
        why = "all sites have a newer roster" if renewed else "asked to end"
        reason = f"{why}; round {progress.round} is in the journal"
        monitor.finish(_summary(config, monitor, "preempted", reason, EXIT_RESUMABLE), _facts(job, None))
        print(f"fedspeed: stopped after round {progress.round} of {config.federation.rounds} ({why}); the same command goes on from there",
              file=sys.stderr)
        return EXIT_RESUMABLE
    best = progress.has_best and progress.best_round != progress.round
    tensors = journal_of(job.order).load_best(progress.best_round) if best else progress.tensors
    kind = export_kind(config)
    card = Card(folder.name, kind, progress.best_round if best else progress.round, lasting_name(config.model.base),
                str(engine.model.config.dtype).removeprefix("torch."), PromptFormat.of(tokenizer, config.data),
                config.model.init == "random")
    with activity.during(f"the export of the {kind}"):
        export(folder / kind, engine.model, tokenizer, tensors, config.model.base, card.text())
        if best:
            export(folder / f"{kind}-last", engine.model, tokenizer, progress.tensors, config.model.base,
                   replace(card, round=progress.round).text())
    if not best:
        shutil.rmtree(folder / f"{kind}-last", ignore_errors=True)  # of an earlier end of this run, whose last round was not its best
    lost = uncounted(monitor.records)
    code = EXIT_FAILED if lost else EXIT_OK
    reason = "; ".join(filter(None, [unbeaten(progress, kind), lost]))
    exported = Export(kind, str(folder / kind), card.base, card.round, card.dtype, card.format, card.drawn)
    monitor.finish(_summary(config, monitor, progress.done, reason, code), _facts(job, exported, predicted), comparison)
    return code


def unbeaten(progress, kind: str) -> str:
    """Say that no round of a run was better than its start; empty if one was, or if there was nothing to compare on."""
    if not progress.has_best or progress.best_round:
        return ""
    return (f"no round beat the start, whose held-out loss is {loss_text(progress.best_loss)}: {kind} holds the start, "
            f"{kind}-last the last round")


def uncounted(records) -> str:
    """Say what did not count, or not fully, in the rounds of a run; empty if all did. Such a run ends with exit code 1."""
    lost, clipped = sum(r.missing_count for r in records), sum(r.clipped for r in records)
    found = [f"{lost} update{'s' if lost > 1 else ''} did not count, see the report"] if lost else []
    return "; ".join(found + (["some updates did not count fully"] if clipped else []))


def export_kind(config: RunConfig) -> str:
    """The name of the folder in a run's folder that holds its result."""
    return "adapter" if config.adapter.method == "lora" else "model"


def report_failure(job: Job, monitor, error: Exception, lost: list[int]) -> None:
    """The reporter's last words about a run that broke: which updates of which round are missing."""
    from fedspeed.monitor.records import MissingUpdates, finished_rounds

    clients = tuple(sorted({c for rank in lost for c in job.topology.place(rank).clients}))
    number = finished_rounds(monitor.records, monitor.absent) + 1
    status = "preempted" if isinstance(error, Preempted) else "failed"
    gaps = (MissingUpdates(number, len(clients), clients),) if clients and 0 <= number <= job.config.federation.rounds else ()
    untold = [name for rank in lost if (name := job.named(rank)) not in str(error)]
    reason = str(error) + (f" (lost: {'; '.join(untold)})" if untold else "")
    monitor.finish(_summary(job.config, monitor, status, reason, getattr(error, "exit_code", EXIT_FAILED), gaps), _facts(job, None))


def tell_where(folder: Path, where: str) -> None:
    """The reporter's word that a run was asked to end in a round, at once: should the round be too long, nobody could say it later.

    For a signal's handler: it writes past Python's own streams, whose write may be what the signal has interrupted.
    """
    text = f"asked to end during {where}" if where else "asked to end"
    with contextlib.suppress(OSError):
        os.write(2, f"fedspeed: {text}; this round is finished first, if there is time\n".encode())
        (folder / ASKED_FILE).write_text(text)


class Stuck:
    """Ends this rank where its main thread waits for a lost one in a call that no exception reaches; the reporter reports first."""

    def __init__(self, job: Job):
        self._job = job
        self.monitor = None  # until there is one

    def __call__(self, lost: tuple[int, ...]) -> None:
        try:
            error = silent(self._job, lost)
            report(error)
            if self._job.reporter and self.monitor is not None:
                report_failure(self._job, self.monitor, error, list(lost))
        finally:
            os._exit(EXIT_RESUMABLE)


def silent(job: Job, lost: tuple[int, ...]) -> LostPeerError:
    names, have = ", ".join(job.named(rank) for rank in lost), "has" if len(lost) == 1 else "have"
    return LostPeerError(f"{names} {have} been silent for {job.config.cluster.silence_s:g} s; the same command resumes from the journal")


def told(error: BaseException, job: Job) -> BaseException:
    """The error, with three that a user can do something about told as what they are: a full device, a full
    disk, a broken connection inside the cluster."""
    if isinstance(error, FedSpeedError):
        return error
    if isinstance(error, OSError) and error.errno in PLACE_ERRORS:
        return FedSpeedError(f"{error.filename or job.order.folder}: cannot be written ({error.strerror}); "
                             f"make room there or choose another place "
                             "(run.out=FOLDER), and the same command goes on from the last round in the journal")
    from fedspeed.engine.world import lost_connection

    if out_of_device_memory(error):
        return FedSpeedError(device_memory_text(error, job.named(job.me), job.config, _tier(job)))
    if not lost_connection(error):
        return error
    return LostPeerError(f"a rank of this cluster was lost: {connection_text(error)}; the same command resumes from the journal")


def _tier(job: Job) -> str:
    """What engine.tier has come to, as far as the configuration tells; empty for a pipeline."""
    config = job.config
    if config.engine.pipeline != "none":
        return ""
    return choose_tier(config.engine, job.order.deepspeed, config.adapter.method != "full")


def tell_refusal(error: BaseException, json_out: TextIO | None, store: Store) -> None:
    """Bad input in the words of `--json`, once for all ranks, whichever is the first to know. The others come back when it is told: the end
    of any rank may be that of all."""
    if json_out is None or not isinstance(error, FedSpeedError) or error.exit_code != EXIT_USAGE:
        return
    if store.is_first("refused") or (store.wait([TOLD], TOLD_S) and store.is_first("refused, but not told")):
        stdout.tell_refusal(json_out, error)
        store.note(TOLD, "")
    error.in_json = True


def abort_mpi(error: BaseException) -> None:
    """Say the error and end all ranks of an MPI job: the others may wait in calls that only MPI can end."""
    import traceback

    from fedspeed.routing.transports.mpi import abort

    if isinstance(error, FedSpeedError):
        print(f"fedspeed: error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
    abort(getattr(error, "exit_code", EXIT_FAILED))


def _summary(config: RunConfig, monitor, status: str, reason: str, code: int, also_missing=()):
    from fedspeed.monitor.records import summarise

    return summarise(monitor.records, status=status, total_rounds=config.federation.rounds, reason=reason, exit_code=code,
                     restarts=int(os.environ.get("FEDSPEED_RESTARTS", "0")), also_missing=also_missing, absent=monitor.absent)


def _trained(adapter) -> str:
    if adapter.method == "full":
        return "everything"
    if adapter.method == "blocks":
        return f"decoder blocks {adapter.blocks}"
    return f"the LoRA adapter {adapter.start_from}" if adapter.start_from else f"LoRA r={adapter.lora_rank} on {adapter.targets}"


def _budget(config) -> str:
    steps = f"{config.train.local_steps} local steps"
    if config.federation.round_budget == "seconds":
        steps = f"{config.federation.round_seconds:g} s of local steps, at most {config.train.local_steps},"
    return f"{steps}{', exchanged behind the next ones,' if config.federation.staleness else ''}"


def _weight_texts(config: RunConfig) -> list[str]:
    try:
        return weight_notes(config)
    except FedSpeedError:  # files that are gone by now; how the run ended is what is to be told
        return []


def _execution(job: Job) -> str:
    """How the model was executed; a run that has ended is told of even where the adapter it started from is gone by now."""
    try:
        outside = outside_blocks(job.config.adapter)
    except FedSpeedError:
        outside = ""
    return execution(job.config, job.order.deepspeed, outside)


def _facts(job: Job, exported, predicted=None):
    from fedspeed.monitor.report import Facts

    config, topology = job.config, job.topology
    run = {
        "model": f"{config.model.base} ({config.model.dtype}, {config.model.init} weights)",
        "trained": _trained(config.adapter),
        "data": f"{config.data.task}, {config.data.clients} clients, split {config.data.split}",
        "rounds": f"{config.federation.rounds} x {_budget(config)} of {config.train.micro_batch * config.train.accumulation} "
                  f"sequences per {'rank' if config.engine.pipeline == 'none' else 'client'}",
        "aggregation": f"{config.federation.aggregation}, server optimizer {config.federation.server_optimizer}",
        "engine": f"{_execution(job)}, launched by {job.launch.kind}",
        "layout": f"{len(job.workers)} ranks in {len(topology.clusters)} cluster{'s' if len(topology.clusters) > 1 else ''}",
    }
    if texts := _weight_texts(config):
        run["the base's files"] = "; ".join(texts)
    hosts = []
    for host in job.launch.hosts:
        clients = sorted({c for p in topology.ranks if p.host == host.name for c in p.clients})
        hosts.append({"host": host.name if host.name != "localhost" else socket.gethostname(), "ranks": str(host.slots),
                      "clients": ", ".join(map(str, clients)) or "idle", "gpu": host.gpu or "-"})
    return Facts(run, tuple(hosts), exported, predicted=predicted)

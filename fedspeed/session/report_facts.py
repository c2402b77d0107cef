"""The facts of a run for its report: model, data, method, engine, layout and hosts."""

import socket
from itertools import islice

from fedspeed.checkpoint.training_facts import TrainingFacts
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.data.row_counts import RowTable
from fedspeed.engine.base.describe import execution
from fedspeed.errors import FedSpeedError
from fedspeed.federation.methods.base import method_class
from fedspeed.federation.pacing import round_text
from fedspeed.federation.run_progress import Progress
from fedspeed.models.checks import weight_notes
from fedspeed.models.lora_ranks import client_ranks, ranks_text
from fedspeed.models.saved_adapter import outside_blocks
from fedspeed.monitor.report import Export, Facts, Predicted
from fedspeed.session.request import Job


def report_facts(job: Job, exported: Export | None, predicted: Predicted | None = None) -> Facts:
    """Return the facts of a job for its report.

    Args:
        exported: None where nothing was exported.
        predicted: memory and time of a step; None where the planner does not model the execution.
    """
    config = job.config
    topology = job.topology
    federation = config.federation
    sequences = config.train.micro_batch * config.train.accumulation
    clusters = sum(bool(cluster.clients) for cluster in topology.clusters)
    server = " and a server" if topology.server else ""
    run = {
        "model": f"{config.model.base} ({config.model.dtype}, {config.model.init} weights)",
        "trained": _trained(config),
        "data": f"{config.data.task}, {config.data.clients} clients, split {config.data.split}",
        "rounds": f"{federation.rounds} x {_budget(config)} of {sequences} "
        f"sequences per {'rank' if config.engine.pipeline == 'none' else 'client'}",
        "method": f"{flow(federation.method)}, server optimizer {federation.server_optimizer}",
        "engine": f"{_execution(job)}, launched by {job.launch.kind}",
        "layout": f"{len(job.workers)} ranks in {clusters} cluster{'s' if clusters > 1 else ''}{server}",
    }
    if texts := _weight_texts(config):
        run["the base's files"] = "; ".join(texts)
    evaluated = method_class(federation.method.name).evaluated
    return Facts(run, tuple(_hosts(job)), exported, predicted=predicted, evaluated=evaluated)


def training_facts(config: RunConfig, progress: Progress, rows: RowTable | None) -> TrainingFacts:
    """Return how a run trained its common model, for the model card.

    Args:
        progress: after the last round. rows: counts of the rows; None if this rank does not know them.
    """
    federation = config.federation
    return TrainingFacts(
        trained=_trained(config),
        method=f"{flow(federation.method)}, server optimizer {federation.server_optimizer}",
        updates=flow(federation.updates) if federation.updates else "",
        privacy=config.routing.mode,
        rounds=progress.round,
        task=config.data.task,
        split=config.data.split,
        clients=config.data.clients,
        rows=rows.total.kept if rows else None,
        client_rows=tuple(counts.kept for counts in rows.clients) if rows else (),
        held_out_loss=float(progress.best_loss) if progress.has_best else None,
        evaluated=method_class(federation.method.name).evaluated,
    )


def _hosts(job: Job) -> list[dict[str, str]]:
    found = []
    places = iter(job.topology.ranks)
    for host in job.launch.hosts:
        own = list(islice(places, host.slots))
        clients = sorted({client for place in own for client in place.clients})
        serves = own[0].world_rank in job.topology.server
        found.append({
            "host": host.name if host.name != "localhost" else socket.gethostname(),
            "ranks": str(host.slots),
            "clients": ", ".join(map(str, clients)) or ("the server" if serves else "idle"),
            "gpu": host.gpu or "-",
        })
    return found


def _trained(config: RunConfig) -> str:
    adapter = config.adapter
    if adapter.method == "full":
        return "everything"
    if adapter.method == "blocks":
        return f"decoder blocks {flow(adapter.blocks)}"
    if adapter.start_from:
        return f"the LoRA adapter {adapter.start_from}"
    text = f"LoRA r={adapter.lora_rank} on {flow(adapter.targets)}"
    if not adapter.rank_by_client:
        return text
    return f"{text} ({ranks_text(client_ranks(adapter, config.data.clients))})"


def _budget(config: RunConfig) -> str:
    steps = round_text(config)
    return f"{steps}{', exchanged during the next ones,' if config.federation.staleness else ''}"


def _weight_texts(config: RunConfig) -> list[str]:
    try:
        return weight_notes(config)
    except FedSpeedError:  # the files are gone by now, which must not hide how the run ended
        return []


def _execution(job: Job) -> str:
    """Describe how the model was executed, also if the adapter to start from is gone by now."""
    try:
        outside = outside_blocks(job.config.adapter)
    except FedSpeedError:
        outside = ""
    return execution(job.config, job.request.deepspeed, outside)

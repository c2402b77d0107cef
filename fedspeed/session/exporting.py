"""The export of a run that is over: every model that its method gives (`Method.models`) as a folder, of the
best round, and beside it of the last one where that is another.

What no single client owns, the reporting rank writes. A client's own model is made and written by the rank
that speaks for the client, into the run's folder on that rank's host: nothing of it is sent.
"""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedspeed import activity
from fedspeed.checkpoint.card import Card
from fedspeed.checkpoint.export import export, lasting_name
from fedspeed.config.run import RunConfig
from fedspeed.data.prompt_format import format_of
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.folded_layout import shared_layout
from fedspeed.federation.keeping import Progress
from fedspeed.federation.layout import Layout
from fedspeed.federation.named_models import COMMON, has_own_models, is_own_model, models_of, own_model
from fedspeed.monitor.report import Export
from fedspeed.session.request import Job
from fedspeed.session.resume import journal_of

LAST = "-last"


@dataclass(frozen=True)
class Standing:
    """What one round left: the state, and the memory of this rank's clients."""

    round: int
    state: Arrays
    memory: dict[int, Arrays]


def export_models(job: Job, federated, progress: Progress, tokenizer) -> Export | None:
    """Write the models that are this rank's to write; return on the reporting rank what the run has exported.

    Where the method gives more models than the common one, collective over all ranks that carry clients: it
    ends when all have written theirs.

    Args:
        federated: this rank's parts of the rounds (federation.parts.RankParts).
    """
    has_more = has_own_models(federated.method)
    if not (job.reporter or has_more):
        return None
    kind = export_kind(job.config)
    last = Standing(progress.round, progress.state, progress.memory)
    best = _best(job, federated.link, progress, is_shared=has_more)
    told = last if best is None else best
    with activity.during(f"the export of the {kind}"):
        written = _write(job, federated, told, tokenizer, is_last=best is None)
        if best is not None:
            written |= _write(job, federated, last, tokenizer, suffix=LAST)
    others = _others(job, federated.link, written) if has_more else ()
    if not job.reporter:
        return None
    card = _card(job, federated.engine, tokenizer, told.round)
    folder = str(job.request.folder / kind)
    return Export(
        kind,
        folder,
        card.base,
        round=card.round,
        dtype=card.dtype,
        prompt=card.format,
        drawn=card.drawn,
        others=others,
    )


def export_kind(config: RunConfig) -> str:
    """Return the name of the folder in a run's folder that holds its result."""
    return "adapter" if config.adapter.method == "lora" else "model"


def folder_of(kind: str, name: str, suffix: str = "") -> str:
    """Return the name of the folder that a model of `Method.models` is exported to."""
    return f"{kind}{suffix}" if name == COMMON else f"{kind}-{name}{suffix}"


def is_ours(name: str, *, reporter: bool, carried: Collection[int]) -> bool:
    """Say whether a model is this rank's to write.

    Args:
        reporter: whether this rank reports. carried: clients that it speaks for.
    """
    return name in map(own_model, carried) if is_own_model(name) else reporter


def _best(job: Job, link, progress: Progress, *, is_shared: bool) -> Standing | None:
    """Return what the best round left; None where that is the last one, or nothing was evaluated.

    Args:
        is_shared: whether ranks need it that do not report, and have no file of it. Collective then.
    """
    if not progress.has_best or progress.best_round == progress.round:
        return None
    state = journal_of(job.request).load_best(progress.best_round) if job.reporter else None
    if is_shared:
        known = float(state is not None)
        own = None if state is None else Layout.of(state)
        layout = shared_layout(link, Layout.of(progress.state), own, known)
        vector = np.zeros(layout.size, dtype=np.float32) if state is None else layout.flatten(state)
        state = layout.unflatten(link.share(vector, known))
    return Standing(progress.best_round, state, progress.best_memory)


def _write(
    job: Job, federated, standing: Standing, tokenizer, *, suffix: str = "", is_last: bool = False
) -> set[str]:
    """Write this rank's models of a round, and return their names.

    Args:
        suffix: of the folders' names. is_last: whether no round after it is exported beside it.
    """
    role = federated.role
    engine = federated.engine
    kind = export_kind(job.config)
    carried = role.clients if role.gateway else ()
    models = models_of(federated.method, standing.state, standing.memory)
    ours = {name for name in models if is_ours(name, reporter=job.reporter, carried=carried)}
    has_more = has_own_models(federated.method)
    for name in sorted(ours):
        folder = job.request.folder / folder_of(kind, name, suffix)
        folder.parent.mkdir(parents=True, exist_ok=True)
        card = _card(job, engine, tokenizer, standing.round, name=name, has_more=has_more)
        export(
            folder,
            engine.model,
            tokenizer,
            tensors=models[name],
            base=job.config.model.base,
            card=card.text(),
        )
        if is_last:  # that of an earlier end of this run, whose last round was not its best
            shutil.rmtree(_last(folder), ignore_errors=True)
    return ours


def _last(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{LAST}")


def _others(job: Job, link, written: set[str]) -> tuple[str, ...]:
    """Return the folders beside the common one, once all ranks have written theirs. Collective. Where clients
    may learn no more than sums, nobody is told which of them have models of their own.
    """
    config = job.config
    kind = export_kind(job.config)
    sums_only = config.routing.sums_only
    flags = np.zeros(1 if sums_only else config.data.clients)
    for client in () if sums_only else range(config.data.clients):
        flags[client] = float(own_model(client) in written)
    told = link.sum(flags, 0.0).vector
    common = sorted(name for name in written if name != COMMON and not is_own_model(name))
    clients = ["client-N"] if sums_only else [own_model(client) for client in np.flatnonzero(told > 0.5)]
    return tuple(folder_of(kind, name) for name in (*common, *clients))


def _card(job: Job, engine, tokenizer, round: int, *, name: str = COMMON, has_more: bool = False) -> Card:
    """Return the card of a model of a round; `has_more`: whether the run has others beside the common one."""
    config = job.config
    kind = export_kind(job.config)
    return Card(
        run=job.request.folder.name,
        kind=kind,
        round=round,
        base=lasting_name(config.model.base),
        dtype=str(engine.model.config.dtype).removeprefix("torch."),
        format=format_of(tokenizer, config.data),
        drawn=config.model.init == "random",
        name="" if name == COMMON else name,
        has_more=has_more,
    )

"""Export of a finished run: every model of its method (`Method.exports`) as a folder.

Models of the best round are exported, and those of the last round in folders of their own where that is
another round. The reporting rank writes common models. A client's own model is written by the rank that
carries the client, into the run's folder on that rank's host, and is never sent.
"""

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedspeed import activity
from fedspeed.checkpoint.card import Card
from fedspeed.checkpoint.export import export, lasting_name
from fedspeed.checkpoint.training_facts import TrainingFacts
from fedspeed.config.run import RunConfig
from fedspeed.data.config import DataConfig
from fedspeed.data.prompt_format import format_of
from fedspeed.data.prompting import PromptFormat
from fedspeed.data.row_counts import RowTable
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.folded_layout import shared_layout
from fedspeed.federation.layout import Layout
from fedspeed.federation.link import ClientLink
from fedspeed.federation.named_models import COMMON, exports_of, has_own_models, is_own_model, own_model
from fedspeed.federation.run_progress import Progress
from fedspeed.models.provenance import origin_text
from fedspeed.monitor.report import Export
from fedspeed.session.report_facts import training_facts
from fedspeed.session.request import Job
from fedspeed.session.resume import journal_of

if TYPE_CHECKING:  # they load torch
    from fedspeed.engine.client_engine import ClientEngine
    from fedspeed.federation.rank_components import RankComponents

LAST = "-last"


@dataclass(frozen=True)
class RoundResult:
    """The result of one round: the global state, and the memory of this rank's clients."""

    round: int
    state: Arrays
    memory: dict[int, Arrays]


def export_models(
    job: Job,
    rank_components: "RankComponents",
    progress: Progress,
    tokenizer: Any,
    rows: RowTable | None = None,
    *,
    data: DataConfig,
) -> Export | None:
    """Write the models that this rank is responsible for; on the reporting rank, return what was exported.

    Collective over all ranks that carry clients if the method has other models than the common one: it
    returns when all are written.

    Args:
        tokenizer: of the run, a transformers tokenizer.
        rows: counts of the rows, for the model card; None on ranks that do not report.
        data: the run's, with the template of its rows.
    """
    has_more = has_own_models(rank_components.method)
    if not (job.reporter or has_more):
        return None
    kind = export_kind(job.config)
    last = RoundResult(progress.round, progress.state, progress.memory)
    best = _best(job, rank_components.link, progress, is_shared=has_more)
    exported = last if best is None else best
    with activity.during(f"the export of the {kind}"):
        facts = training_facts(job.config, progress, rows)
        written = _write(
            job, rank_components, exported, tokenizer, data=data, is_last=best is None, facts=facts
        )
        if best is not None:
            facts = replace(facts, held_out_loss=None)  # it is not that of the best round
            written |= _write(job, rank_components, last, tokenizer, data=data, suffix=LAST, facts=facts)
    others = _others(job, rank_components.link, written) if has_more else ()
    if not job.reporter:
        return None
    card = _card(job, rank_components.engine, format_of(tokenizer, data), exported.round)
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


def export_kind(config: RunConfig) -> Literal["adapter", "model"]:
    """Return what a run exports, which is also the name of the folder in the run's folder."""
    return "adapter" if config.adapter.method == "lora" else "model"


def folder_of(kind: str, name: str, suffix: str = "") -> str:
    """Return the name of the folder that a model of `Method.models` is exported to."""
    return f"{kind}{suffix}" if name == COMMON else f"{kind}-{name}{suffix}"


def is_ours(name: str, *, reporter: bool, carried: Collection[int]) -> bool:
    """Return whether this rank writes a model.

    Args:
        reporter: whether this rank reports. carried: clients that it is the gateway of.
    """
    return name in map(own_model, carried) if is_own_model(name) else reporter


def _best(job: Job, link: ClientLink, progress: Progress, *, is_shared: bool) -> RoundResult | None:
    """Return the result of the best round; None if it is the last round, or nothing was evaluated.

    Args:
        is_shared: whether all ranks need it. The reporting rank then sends it, of a site to the site's own
            ranks only; collective.
    """
    if not progress.has_best or progress.best_round == progress.round:
        return None
    state = journal_of(job.request).load_best(progress.best_round) if job.reporter else None
    if is_shared:
        if job.config.routing.between_organisations:
            state = link.arrays_from_gateway(state)
        else:
            state = _shared(link, state, Layout.of(progress.state))
    assert state is not None  # the other ranks call this only where the result is shared
    return RoundResult(progress.best_round, state, progress.best_memory)


def _shared(link: ClientLink, state: Arrays | None, known: Layout) -> Arrays:
    """Return the reporting rank's state on all ranks of a job of one operator. Collective.

    Args:
        state: None on other ranks. known: a layout of this run.
    """
    priority = float(state is not None)
    own = None if state is None else Layout.of(state)
    layout = shared_layout(link, known, own, priority)
    vector = np.zeros(layout.size, dtype=np.float32) if state is None else layout.flatten(state)
    shared = link.share(vector, priority)
    assert shared is not None  # the reporting rank has it
    return layout.unflatten(shared)


def _write(
    job: Job,
    rank_components: "RankComponents",
    result: RoundResult,
    tokenizer: Any,
    *,
    data: DataConfig,
    suffix: str = "",
    is_last: bool = False,
    facts: TrainingFacts | None = None,
) -> set[str]:
    """Write this rank's models of a round, and return their names.

    Args:
        data: the run's, with the template of its rows. suffix: of the folders' names.
        is_last: whether this is the last round, so that no other is exported.
        facts: how the common model was trained, for its card.
    """
    role = rank_components.role
    engine = rank_components.engine
    kind = export_kind(job.config)
    carried = role.clients if role.gateway else ()
    models = exports_of(rank_components.method, result.state, result.memory)
    ours = {name for name in models if is_ours(name, reporter=job.reporter, carried=carried)}
    has_more = has_own_models(rank_components.method)
    for name in sorted(ours):
        folder = job.request.folder / folder_of(kind, name, suffix)
        folder.parent.mkdir(parents=True, exist_ok=True)
        card = _card(job, engine, format_of(tokenizer, data), result.round, name=name, has_more=has_more)
        if name == COMMON:
            card = replace(card, facts=facts)
        export(
            folder,
            engine.model,
            tokenizer,
            tensors=models[name],
            base=job.config.model.base,
            card=card.text(),
            chat_template=card.format.chat.jinja if card.format.chat else "",
            stop_ids=card.format.end[0],
        )
        if is_last:  # an earlier, shorter run may have exported its last round
            shutil.rmtree(_last(folder), ignore_errors=True)
    return ours


def _last(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{LAST}")


def _others(job: Job, link: ClientLink, written: set[str]) -> tuple[str, ...]:
    """Return the folders of all models but the common one, once all ranks have written theirs. Collective.

    Where clients may learn sums only, it is not revealed which clients have models of their own.
    """
    config = job.config
    kind = export_kind(job.config)
    sums_only = config.routing.sums_only
    flags = np.zeros(1 if sums_only else config.data.clients)
    for client in () if sums_only else range(config.data.clients):
        flags[client] = float(own_model(client) in written)
    totals = link.sum(flags, 0.0).vector
    common = sorted(name for name in written if name != COMMON and not is_own_model(name))
    clients = (
        ["client-N"] if sums_only else [own_model(int(client)) for client in np.flatnonzero(totals > 0.5)]
    )
    return tuple(folder_of(kind, name) for name in (*common, *clients))


def _card(
    job: Job,
    engine: "ClientEngine",
    format: PromptFormat,
    round: int,
    *,
    name: str = COMMON,
    has_more: bool = False,
) -> Card:
    """Return the card of an exported model.

    Args:
        format: of the prompts. round: that its weights are of. name: of the model.
        has_more: whether the run exports several models.
    """
    config = job.config
    kind = export_kind(job.config)
    return Card(
        run=job.request.folder.name,
        kind=kind,
        round=round,
        base=lasting_name(config.model.base),
        origin=origin_text(config.model.base),
        dtype=str(engine.model.config.dtype).removeprefix("torch."),
        format=format,
        drawn=config.model.init == "random",
        name="" if name == COMMON else name,
        has_more=has_more,
    )

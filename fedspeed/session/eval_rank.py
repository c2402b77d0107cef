"""The life of one rank of `fedspeed eval`: it meets the others, builds its share of the engine, and scores.

All ranks together are one client without rounds, so that the engine divides the items among them as it
divides the rows of a step.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from fedspeed import activity
from fedspeed.cluster import rendezvous
from fedspeed.cluster.discover import from_process
from fedspeed.cluster.topology import topology_of
from fedspeed.data.eval_task import EvalTask
from fedspeed.data.prompt_template import template_for
from fedspeed.engine.world import leave_world
from fedspeed.errors import EXIT_OK, FedSpeedError
from fedspeed.evaluation.harness import evaluate_tasks, load_tasks
from fedspeed.evaluation.harness_results import HarnessTasks
from fedspeed.evaluation.report_section import update_report
from fedspeed.evaluation.results import (
    add_results,
    harness_result_of,
    read_results,
    result_of,
    results_table,
    write_answers,
)
from fedspeed.log import LOG
from fedspeed.models.tokenizer import load_tokenizer
from fedspeed.monitor.clock import StageClock
from fedspeed.monitor.stdout import JsonLines
from fedspeed.session import components, numeric_type, preflight, shared_gpus
from fedspeed.session.coordination import CheckIn
from fedspeed.session.ending import Ending
from fedspeed.session.eval_request import EvalRequest
from fedspeed.session.rank import join_cluster
from fedspeed.session.request import Job, RunRequest

if TYPE_CHECKING:  # they load torch
    from fedspeed.engine.client_engine import ClientEngine
    from fedspeed.evaluation.scoring import ScoredItem

SCORING_S = 24 * 3600.0  # for the first rank to score the answers to a task
LEAVE_S = 60.0  # for rank 0, which holds the store, to wait for the other ranks at the end


def run_eval_rank(request: EvalRequest, json_out: TextIO | None) -> Ending:
    """Take part in an evaluation as the rank that the environment variables name; return how it ended.

    Args:
        json_out: where rank 0 writes its results as JSON; None: it prints a table.

    Raises:
        FedSpeedError: the evaluation failed for a reason that the user can act on.
    """
    run_request = RunRequest(request.target.loaded)
    launch = from_process(None)
    job = Job(run_request, launch, topology_of(run_request.config, launch.hosts))
    with activity.during("the wait for all ranks"):
        store = rendezvous.meet(launch, run_request.config.cluster.start_timeout_s)
    with components.show_progress(job):
        results = _evaluate(request, job, store)
    if job.reporter:
        _show(request, results, json_out)
    rendezvous.leave(store, LEAVE_S)
    if results.unwritten:
        raise FedSpeedError(
            results.unwritten, remedy="make room there, or choose another file, and evaluate again"
        )
    return Ending(status="finished", exit_code=EXIT_OK)


@dataclass
class _Results:
    """What was evaluated, and the results of each task with the answers to its items.

    Attributes:
        unwritten: why the files do not hold all of it; empty if they do.
    """

    target: dict[str, Any]
    results: list[dict[str, Any]]
    items: "list[tuple[str, list[ScoredItem]]]"
    unwritten: str = ""


def _evaluate(request: EvalRequest, job: Job, store: rendezvous.Store) -> _Results:
    shared_gpus.publish_gpu(job, store)
    decided = numeric_type.agree(job, store)
    job = decided.job
    if decided.text and job.reporter:
        LOG.info(decided.text)
    with CheckIn(job, store, "ready"):
        preflight.check_files(job.request.loaded)
        _, sharers = shared_gpus.check_shared_gpus(job, store)
        tokenizer = load_tokenizer(job.config.model)
        template = template_for(request.target.data, tokenizer)
        tasks = [(task, task.items(request.limit)) for task in request.make_tasks()]
        harness = load_tasks(request.harness, request.harness_settings) if request.harness else []
    join_cluster(job, store)
    with activity.during("the building of the engine"):
        engine = components.make_engine(job, StageClock(), sharers)
    try:
        engine.load(engine.state())
        done = _scored(request, job, engine, store, tasks=tasks, tokenizer=tokenizer, template=template)
        for of_harness in harness:
            _score_harness(request, engine, tokenizer, of_harness, done=done)
        return done
    finally:
        with suppress(Exception):  # after a failure of another rank there is nobody to close with
            engine.close()
            leave_world()
        shutil.rmtree(components.swap_folder(job), ignore_errors=True)


def _scored(
    request: EvalRequest,
    job: Job,
    engine: "ClientEngine",
    store: rendezvous.Store,
    *,
    tasks: list[tuple[EvalTask, Any]],
    tokenizer: Any,
    template: Any,
) -> _Results:
    """Score all tasks; the reporting rank writes each result as soon as it is there."""
    from fedspeed.evaluation.scoring import score_task

    target = request.target.to_json() | {"template": template.name, "dtype": job.config.model.dtype}
    done = _Results(target, [], [])
    for task, items in tasks:
        began = time.monotonic()
        scores = score_task(engine, task, items, tokenizer=tokenizer, template=template)
        if not job.reporter:
            # It runs programs longer than a collective would wait for it.
            store.wait([f"scored/{task.name}"], SCORING_S)
            continue
        store.put(f"scored/{task.name}", "")
        if unscored := len(items) - len(scores.items):
            LOG.info(
                f"{task.name}: {unscored} of {len(items)} rows are not scored, because nothing of their "
                f"answers fits into data.max_tokens={request.target.data.max_tokens}"
            )
        seconds = time.monotonic() - began
        _keep(request, done, result_of(task, scores, limit=request.limit, seconds=seconds), scores.items)
    return done


def _score_harness(
    request: EvalRequest, engine: "ClientEngine", tokenizer: Any, tasks: HarnessTasks, *, done: _Results
) -> None:
    """Compute tasks of lm-evaluation-harness, and keep their result on the reporting rank."""
    began = time.monotonic()
    result = evaluate_tasks(engine, tokenizer, tasks, request.harness_settings)
    if result is not None:
        seconds = time.monotonic() - began
        values = harness_result_of(result, limit=request.limit, seconds=seconds)
        _keep(request, done, values, result.scores.items)


def _keep(
    request: EvalRequest, done: _Results, result: dict[str, Any], items: "Sequence[ScoredItem]"
) -> None:
    """Write a result as soon as it is there, and the answers to its items.

    What a full disk prevents is tried again with the next result.
    """
    done.results.append(result | request.labels(result["task"]))
    done.items.append((result["task"], list(items)))
    file = request.out
    try:
        add_results(request.out, done.target, done.results)
        if request.answers is not None:
            file = request.answers
            write_answers(file, done.items)
        if request.target.report is not None and request.out == request.target.results:
            file = request.target.report
            update_report(file, read_results(request.out)["results"])
        done.unwritten = ""
    except OSError as error:
        done.unwritten = f"{file}: cannot be written ({error.strerror})"


def _show(request: EvalRequest, done: _Results, json_out: TextIO | None) -> None:
    """Print the results, and where they are."""
    if json_out is not None:
        lines = JsonLines(json_out)
        for result in done.results:
            lines.write("evaluation", {"target": done.target, **result})
    else:
        header = ("task", "score", "", "95 % interval", "items")
        rows = [header, *results_table(done.results)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), flush=True)
    if note := done.target.get("note"):
        LOG.info(note)
    if done.unwritten:
        return
    LOG.info(f"results: {request.out}")
    if request.answers is not None:
        LOG.info(f"answers: {request.answers}")

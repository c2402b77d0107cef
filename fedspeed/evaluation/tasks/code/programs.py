"""Tests completions of exercises: every program runs in a sandbox of its own, several at a time."""

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from fedspeed import activity
from fedspeed.evaluation.languages import LANGUAGES
from fedspeed.evaluation.languages.language import Exercise
from fedspeed.evaluation.sandbox.runner import MAX_WORKERS, Runner, SandboxError, Unprotected, checked_sandbox
from fedspeed.log import LOG

_CORES_PER_HOST_VARIABLE = "LOCAL_WORLD_SIZE"  # ranks that evaluate on this host at the same time


def runner_for(languages: Sequence[str], *, unsafe: bool) -> Runner:
    """Return what runs programs of some languages, after a trial program in each.

    Args:
        unsafe: whether programs may run without a sandbox where none can.

    Raises:
        SandboxError: there is no sandbox, or the tools of a language are missing.
    """
    try:
        runner: Runner = checked_sandbox()
    except SandboxError as error:
        if not unsafe:
            raise
        LOG.warning(
            f"generated programs run WITHOUT a sandbox, as allowed: they can read and change what this user "
            f"can, and reach the network ({error.reason})"
        )
        runner = Unprotected()
    problems = [problem for name in languages if (problem := _problem(runner, name))]
    if problems:
        raise SandboxError(". ".join(problems))
    return runner


def _problem(runner: Runner, name: str) -> str:
    """Return why programs of a language cannot be run, with the remedy; empty if they can."""
    language = LANGUAGES[name]
    remedy = f"install {language.install}"
    try:
        outcome = runner.run(language.job(language.trial))
    except FileNotFoundError as error:
        return f"{language.title} programs cannot be run: there is no {error}; {remedy}"
    if "works" in outcome.text:
        return ""
    reason = (outcome.text.strip() or outcome.killed_for or f"exit code {outcome.exit_code}")[-300:]
    return f"{language.title} programs cannot be run: {reason}; {remedy}"


def passed(
    runner: Runner, exercises: Sequence[Exercise], completions: Sequence[Sequence[str]]
) -> list[list[bool]]:
    """Return for every completion of every exercise whether it passes the tests. Equal completions of an
    exercise run once.
    """
    work = [(index, text) for index, texts in enumerate(completions) for text in dict.fromkeys(texts)]
    verdicts: dict[tuple[int, str], bool] = {}
    with (
        activity.during("running generated programs", len(work), "program"),
        ThreadPoolExecutor(_workers()) as pool,
    ):
        pending = {pool.submit(passes, runner, exercises[index], text): (index, text) for index, text in work}
        try:
            for future in as_completed(pending):
                verdicts[pending[future]] = future.result()
                activity.advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [[verdicts[index, text] for text in texts] for index, texts in enumerate(completions)]


def passes(runner: Runner, exercise: Exercise, completion: str) -> bool:
    """Return whether a completion passes the tests of its exercise.

    The exit code proves nothing, since a program can end itself before the tests: the program has to print a
    number that is drawn for this run and printed behind the tests.
    """
    language = LANGUAGES[exercise.language]
    proof = secrets.token_hex(16)
    outcome = runner.run(language.job(language.source(exercise, completion, proof)))
    return not outcome.killed_for and outcome.exit_code == 0 and proof in outcome.text


def _workers() -> int:
    ranks = int(os.environ.get(_CORES_PER_HOST_VARIABLE, "1"))
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // ranks))

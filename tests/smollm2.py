"""A real language model for tests: SmolLM2-135M-Instruct, which launchers/fetch-smollm2.sh makes."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "smollm2-135m"


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct; skip the test where the model is absent.

    $FEDSPEED_SMOLLM2 names another folder than runs/smollm2-135m.
    """
    folder = Path(os.environ.get("FEDSPEED_SMOLLM2") or FOLDER)
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} holds no SmolLM2-135M; bash launchers/fetch-smollm2.sh makes it")
    return folder.resolve()

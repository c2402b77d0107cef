"""The data room and the tokenizer module load neither torch nor transformers: `--dry-run` and `--help` stay
quick.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    f"fedspeed.data.{path.stem}"
    for path in (ROOT / "fedspeed" / "data").glob("*.py")
    if path.stem != "__init__"
] + ["fedspeed.models.tokenizer"]


def test_no_heavy_import():
    code = (
        f"import sys, {', '.join(MODULES)}; print({{'torch', 'transformers', 'tokenizers', 'datasets', "
        f"'deepspeed'}} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )
    assert len(MODULES) > 8

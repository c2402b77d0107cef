"""A folder of a model, a tokenizer or an adapter holds no code that FedSpeed runs."""

import ast
import json
from pathlib import Path

import pytest

from fedspeed.errors import ModelError
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.models.loading import meta_model
from fedspeed.models.tokenizer import byte_tokenizer, check_ids, load_tokenizer
from fedspeed.session import chat
from tests.conftest import ROOT
from tests.tiny import write_llama

CODE = """
from pathlib import Path
from transformers import {base} as Base

(Path(__file__).parent / "ran").touch()
Path({marker!r}).touch()


class Custom(Base):
    model_type = "custom"
"""
CLASSES = {
    "AutoConfig": "PreTrainedConfig",
    "AutoModelForCausalLM": "LlamaForCausalLM",
    "AutoTokenizer": "PreTrainedTokenizerFast",
}


@pytest.fixture
def marker(tmp_path):
    """Return the path of a file that the code in a folder would write."""
    return tmp_path / "code-has-run"


def folder_with_code(folder: Path, marker: Path, **config) -> Path:
    """Write a base and a tokenizer, each of which names code in the folder for every class."""
    write_llama(folder, hidden=32, layers=1, vocab=260, intermediate=48, heads=2, kv_heads=1)
    byte_tokenizer().save_pretrained(folder)
    for kind, base in CLASSES.items():
        (folder / f"{kind.lower()}.py").write_text(CODE.format(base=base, marker=str(marker)))
    names = {kind: f"{kind.lower()}.Custom" for kind in CLASSES}
    for file, changes in (
        ("config.json", {"auto_map": names, **config}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, names["AutoTokenizer"]]}}),
    ):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_the_code_would_run_if_it_were_trusted(tmp_path, marker):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(
        folder_with_code(tmp_path / "m", marker, model_type="custom"), trust_remote_code=True
    )
    assert marker.exists()


@pytest.mark.parametrize("kind", ["llama", "custom"])
def test_a_folder_with_code_runs_none_of_it(tmp_path, marker, kind):
    """Also for a model_type that only this code knows; a known one is built by transformers' own class."""
    folder = folder_with_code(tmp_path / "m", marker, model_type=kind)
    config = ModelConfig(base=str(folder), dtype="fp32")
    (folder / "README.md").write_text("---\nfedspeed:\n  template: plain\n  dtype: float32\n---\n")
    uses = (
        lambda: meta_model(config, AdapterConfig()),
        lambda: load_tokenizer(config),
        lambda: load_tokenizer(ModelConfig(base="gpt3-125m", tokenizer=str(folder))),
        lambda: check_ids(3, config),
        lambda: chat.load(folder),
    )
    for use in uses:
        try:
            use()
        except ModelError as error:
            assert str(folder) in str(error)
        assert not marker.exists() and not (folder / "ran").exists()
    if kind == "llama":
        assert type(meta_model(config, AdapterConfig()).get_base_model()).__module__.startswith(
            "transformers."
        )


@pytest.mark.parametrize("name", ["owner/kernel", {"": "owner/kernel"}, "flash_attention_2", 5, ["a"]])
def test_attention_is_not_computed_by_code_of_the_hub(tmp_path, marker, name):
    folder = folder_with_code(tmp_path / "m", marker, attn_implementation=name)
    (folder / "README.md").write_text("---\nfedspeed:\n  template: plain\n  dtype: float32\n---\n")
    for use in (
        lambda: meta_model(ModelConfig(base=str(folder), dtype="fp32"), AdapterConfig()),
        lambda: chat.load(folder),
    ):
        with pytest.raises(ModelError, match="attn_implementation=.* is code from elsewhere"):
            use()


def calls_of_transformers(path: Path):
    """Yield the calls in a file that could load code from a folder."""
    for node in ast.walk(ast.parse(path.read_text())):
        function = node.func if isinstance(node, ast.Call) else None
        if (
            isinstance(function, ast.Attribute)
            and function.attr in ("from_pretrained", "from_config")
            and isinstance(function.value, ast.Name)
            and function.value.id.startswith("Auto")
        ):
            yield node


def test_every_call_says_that_no_code_is_trusted():
    calls = [
        (path.relative_to(ROOT), call)
        for room in ("fedspeed", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
        for call in calls_of_transformers(path)
    ]
    trusting = [
        f"{path}:{call.lineno}"
        for path, call in calls
        if not any(
            word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in call.keywords
        )
    ]
    assert len(calls) >= 6 and trusting == []

"""Hub names: found out quickly whether the model is to be had, downloaded once, read from the cache without a
network. Against a hub on this machine, with the real client in processes of their own.
"""

import json
import os
import socket
import subprocess
import sys

import pytest

from fedspeed.errors import ModelError
from fedspeed.models.catalogue import KNOWN, from_config
from fedspeed.models.hub import model_folder
from fedspeed.models.local_config import SHIPPED, local_folder, shipped_names
from fedspeed.models.planned_shape import planned_shape
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.models.hub_server import hub
from tests.models.test_catalogue import SMALL
from tests.tiny import write_llama


def ask(code: str, place, home, **environment: str) -> str:
    """What a process says in which `place` is the hub and `home` its cache: the result of an expression, or
    the error's text.
    """
    program = (
        "import json, sys\nfrom fedspeed.errors import ModelError\nfrom fedspeed.models import hub, "
        "local_config, planned_shape\n"
        f"try:\n    print({code})\nexcept ModelError as error:\n    print('ModelError:', error)\n"
        "print('heavy:', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={
            **os.environ,
            "HF_ENDPOINT": place,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    text, _, heavy = done.stdout.rpartition("heavy: ")
    assert heavy == "[]\n"
    return text.strip()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_llama(folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()} | {
        "tokenizer.json": b"{}",
        "README.md": b"#",
    }
    pickled = {
        name: b"x"
        for name in ("optimizer.pt", "original/params.pth", "pytorch_model.bin", "training_args.bin")
    }
    pickled["config.json"] = whole["config.json"]
    return {
        "org/whole": whole,
        "org/pickled": pickled,
        "org/wordless": {name: content for name, content in whole.items() if name != "tokenizer.json"},
        "org/bert": {"config.json": b'{"model_type": "bert"}', "model.safetensors": b""},
    }


def test_a_plan_downloads_the_configuration_and_a_run_the_files_once(models, tmp_path):
    with hub(models) as (place, asked):
        assert ask("planned_shape.planned_shape('org/whole')", place, tmp_path).startswith(
            "ModelShape(name='org/whole', family='llama', hidden=64"
        )
        assert [path for path in asked if "safetensors" in path] == []
        assert ask("local_config.local_folder('org/whole')", place, tmp_path) == "None", (
            "a configuration alone is no base to train"
        )
        folder = ask("hub.model_folder('org/whole')", place, tmp_path)
        count = len(asked)
        assert sorted(os.listdir(folder)) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        assert ask("hub.model_folder('org/whole')", place, tmp_path) == folder and len(asked) == count, (
            "the cache is asked first"
        )
    for environment in ({"HF_HUB_OFFLINE": "1"}, {}):  # offline by setting, and offline without one
        assert (
            ask(
                "(hub.model_folder('org/whole'), planned_shape.planned_shape('org/whole').layers)",
                place,
                tmp_path,
                **environment,
            )
            == f"(PosixPath('{folder}'), 2)"
        )


def test_a_base_without_a_tokenizer_is_whole_where_none_is_asked_of_it(models, tmp_path):
    with hub(models) as (place, _):
        folder = ask("hub.model_folder('org/wordless')", place, tmp_path)
    code = "hub.model_folder('org/wordless'), local_config.local_folder('org/wordless', tokenizer=True)"
    assert ask(code, place, tmp_path, HF_HUB_OFFLINE="1") == f"{folder} None"


@pytest.mark.parametrize(("tokenizer", "found"), [("bytes", True), ("auto", False)])
def test_the_dry_run_asks_for_a_bases_tokenizer_where_the_run_does(monkeypatch, tmp_path, tokenizer, found):
    from fedspeed.config.load import load
    from fedspeed.models.checks import local_base

    write_llama(tmp_path)
    monkeypatch.setattr("fedspeed.models.local_config.cached_file", lambda base, file: tmp_path / file)
    config = load(None, ["model.base=org/wordless", f"model.tokenizer={tokenizer}"]).config
    assert local_base(config) == (tmp_path if found else None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/gone", ("org/gone is no folder here", "the hub has no such model", "hf auth login")),
        (
            "org/pickled",
            ("model.base=org/pickled", "no safetensors of it, but pytorch_model.bin", "import-base FOLDER"),
        ),
        ("org/bert", ("model_type is 'bert'", "llama, qwen2, gpt2")),
    ],
)
def test_what_the_hub_does_not_have_is_reported_before_a_file_is_requested(models, tmp_path, name, says):
    with hub(models) as (place, asked):
        text = ask(f"hub.model_folder('{name}')", place, tmp_path)
    assert text.startswith("ModelError:") and all(words in text for words in says)
    assert not [path for path in asked if "/resolve/" in path]


def test_without_a_network_the_model_is_what_is_missing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        text = ask("setattr(hub, 'ANSWER_S', 0.2) or hub.model_folder('org/whole')", place, tmp_path)
    for message, why in (
        (text, "the hub cannot be reached"),
        (ask("hub.model_folder('org/whole')", place, tmp_path, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set"),
        (
            ask("planned_shape.planned_shape('org/whole')", place, tmp_path),
            "Known without a network are deepseek-ai/",
        ),
    ):
        assert (
            message.startswith("ModelError: model.base: org/whole is no folder here")
            and why in message
            and "hf download org/whole" in message
        )


def test_the_tokenizer_of_a_model_that_is_missing_is_not_the_fault(monkeypatch, tmp_path):
    from fedspeed.models.config import ModelConfig
    from fedspeed.models.tokenizer import load_tokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelError, match="model.base: org/none is no folder here.*HF_HUB_OFFLINE is set"
    ) as caught:
        load_tokenizer(ModelConfig(base="org/none"))
    assert "tokenizer" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in KNOWN if name.startswith("gpt3-")])
def test_shipped_configurations_are_those_of_the_catalogue(name):
    where = SHIPPED / name / "config.json"
    assert from_config(json.loads(where.read_text()), name, str(where)) == KNOWN[name]
    assert local_folder(name.upper()) == model_folder(name) == SHIPPED / name


def test_a_shipped_model_can_be_trained_from_drawn_weights_only():
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.models.loading import meta_model

    drawn = meta_model(
        ModelConfig(base="gpt3-125m", init="random", dtype="fp32"), AdapterConfig(method="full")
    )
    assert sum(p.numel() for p in drawn.parameters()) == KNOWN["gpt3-125m"].total
    with pytest.raises(ModelError, match="gpt3-125m: no model.safetensors.*set model.init=random"):
        meta_model(ModelConfig(base="gpt3-125m", dtype="fp32"), AdapterConfig(method="full"))


def test_every_shipped_model_can_be_planned():
    assert {name for name in KNOWN if name.startswith("gpt3-")} < set(shipped_names())
    assert all(planned_shape(name).total > 1e5 for name in shipped_names())


def test_a_plan_takes_any_folder_and_its_weights_say_whether_the_head_is_tied(tmp_path):
    from safetensors.numpy import load_file, save_file

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(SMALL["llama-odd"]))
    assert planned_shape(str(tmp_path / "bare" / "config.json")).tied
    folder = write_llama(tmp_path / "whole", tie_word_embeddings=True)
    assert planned_shape(folder).tied
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    assert not planned_shape(folder).tied

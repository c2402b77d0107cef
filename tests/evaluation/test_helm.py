"""The files for HELM, as a format."""

import datetime
import json
import re

import pytest
import yaml

from fedspeed.cli import main
from fedspeed.errors import ModelError
from fedspeed.evaluation.helm import write_helm
from fedspeed.evaluation.helm_entries import SCENARIOS

# Keys that HELM's documentation (adding_new_models.md, adding_new_tokenizers.md) shows, and their types.
DEPLOYMENT = {
    "name": str,
    "model_name": str,
    "tokenizer_name": str,
    "max_sequence_length": int,
    "client_spec": dict,
}
METADATA = {
    "name": str,
    "display_name": str,
    "description": str,
    "creator_organization_name": str,
    "access": str,
    "release_date": datetime.date,
    "tags": list,
}
TOKENIZER = {"name": str, "tokenizer_spec": dict, "end_of_text_token": str, "prefix_token": str}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "my run" / "merged"
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "max_position_embeddings": 512, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    tokens = {"eos_token": {"content": "</s>"}, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def one(path, key, types):
    """Return the one entry of a file, whose keys and types must be those that HELM reads."""
    values = yaml.safe_load(path.read_text())
    assert list(values) == [key]
    [entry] = values[key]
    assert {name: type(value) for name, value in entry.items()} == types
    return entry


def test_the_files_have_the_form_that_helm_reads(model, tmp_path):
    out = tmp_path / "helm"
    written = write_helm(out, str(model))
    assert sorted(written) == sorted(path for path in out.rglob("*") if path.is_file())
    deployment = one(out / "prod_env" / "model_deployments.yaml", "model_deployments", DEPLOYMENT)
    metadata = one(out / "prod_env" / "model_metadata.yaml", "models", METADATA)
    tokenizer = one(out / "prod_env" / "tokenizer_configs.yaml", "tokenizer_configs", TOKENIZER)
    name = "fedspeed/my-run-merged"
    assert {deployment["name"], deployment["model_name"], deployment["tokenizer_name"]} == {name}
    assert metadata["name"] == tokenizer["name"] == name and metadata["access"] in {
        "open",
        "limited",
        "closed",
    }
    assert deployment["max_sequence_length"] == 512
    assert deployment["client_spec"] == {
        "class_name": "helm.clients.huggingface_client.HuggingFaceClient",
        "args": {"pretrained_model_name_or_path": str(model), "torch_dtype": "torch.bfloat16"},
    }
    assert tokenizer["tokenizer_spec"]["args"] == {"pretrained_model_name_or_path": str(model)}
    assert (tokenizer["end_of_text_token"], tokenizer["prefix_token"]) == ("</s>", "")


def test_the_run_entries_are_the_sixteen_published_scenarios(model, tmp_path):
    write_helm(tmp_path, str(model))
    text = (tmp_path / "run_entries.conf").read_text()
    assert text.startswith("entries: [") and text.rstrip().endswith("]")
    entries = re.findall(
        r'^  \{description: "(\w+):model=fedspeed/my-run-merged,([^"]+)", priority: 1\}$', text, re.M
    )
    assert len(entries) == len(set(entries)) == 90 == text.count("description")
    assert len(SCENARIOS) == 16 and text.count("  # ") == 16
    names = [name for name, _ in entries]
    counts = {"mmlu": 57, "raft": 11, "civil_comments": 9, "natural_qa": 2, "commonsense": 2, "msmarco": 2}
    assert {name: names.count(name) for name in counts} == counts
    assert all(re.fullmatch(r"\w+=[\w.]+", part) for _, rest in entries for part in rest.split(","))
    assert "helm-run --conf-paths run_entries.conf" in (tmp_path / "README.md").read_text()


def test_an_adapter_or_an_empty_folder_is_refused(model, tmp_path):
    with pytest.raises(ModelError, match="holds no model with its tokenizer .*export RUN --merged"):
        write_helm(tmp_path / "out", str(tmp_path))
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, .*export RUN --merged"):
        write_helm(tmp_path / "out", str(model))
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused(model, capsys):
    assert main(["eval", str(model), "--helm", str(model / "config.json")]) == 2
    assert f"{model / 'config.json'}: cannot be written" in capsys.readouterr().err

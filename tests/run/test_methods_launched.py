"""Methods of federated training as a user runs them: asked for without starting, run, resumed, exported."""

import pytest
from safetensors.numpy import load_file

from tests.run.launched import LLAMA, ROOT, SETTINGS, assert_same_run, records

NAMES = ("fedprox", "scaffold", "fedsa", "fedkseed")
EXPORT = (str(ROOT / "fedspeed" / "__main__.py"), "export")
# What all of them can be combined with.
TRAIN = {"local_steps": 2, "micro_batch": 4, "optimizer": "sgd", "lr": 1e-3}


@pytest.fixture(scope="module")
def config(shared_workshop):
    """Return the configuration of a run on a base that is in files, so that it can be exported."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    base = shared_workshop.folder / "launched"
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(base)
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
    def run(folder, *arguments):
        method = f"federation.method.name={name}"
        given = (f"run.name={folder}", method, "monitor.plot=false", *arguments)
        return shared_workshop.finish_run(*given, config=config)

    dry = run(f"{name}-dry", "--dry-run")
    assert "nothing was started" in dry.out and not (shared_workshop.runs / f"{name}-dry").exists()
    run(name)
    run(f"{name}-apart", "federation.rounds=2")
    run(f"{name}-apart")
    whole = shared_workshop.runs / name
    assert_same_run(shared_workshop.runs / f"{name}-apart", whole)
    assert [record["round"] for record in records(whole)] == [0, 1, 2, 3]
    assert all(record["update_norm"] > 0 for record in records(whole)[1:])
    exported = shared_workshop.finish_run(command=(*EXPORT, str(whole)))
    tensors = load_file(whole / "export" / "adapter_model.safetensors")
    assert tensors and str(whole / "export") in exported.out

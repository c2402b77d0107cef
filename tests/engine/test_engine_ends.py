"""The embedding and the head are those of the base's files, whatever config.json says about tying: every tier
has the losses of plain transformers.
"""

import pytest

from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig, LastBlocks
from tests.engine.engines import engine
from tests.limits import LIMIT_S
from tests.processes import run_clusters
from tests.tiny import random_step

METHODS = {
    "lora": AdapterConfig(targets="all-linear"),
    "blocks": AdapterConfig(method="blocks", blocks=LastBlocks(1)),
    "full": AdapterConfig(method="full"),
}
ENDS = ("untied", "head")  # the files have an embedding and a different head, or the head alone
# (family, ends, method) -> kinds of engines.
CASES = {
    ("llama", "untied", "lora"): ("zero0", "zero3", "resident", "ram", "nvme", "client"),
    ("llama", "untied", "blocks"): ("ram",),
    ("llama", "untied", "full"): ("zero3",),
    ("llama", "head", "lora"): ("zero3", "ram"),
    ("gpt2", "untied", "lora"): ("zero0", "ram"),
    ("gpt2", "head", "blocks"): ("zero0",),
}


def write_ends(family: str, ends: str, folder) -> str:
    """Write a base whose config.json ties the head to the embedding."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": {"intermediate_size": 48, "num_key_value_heads": 1},
        "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    }[family]
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=260,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        **sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"]
    tensors["lm_head.weight"] = 2 * table.flip(0)
    if ends == "head":
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not table}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def plain_loss(base: str, step) -> float:
    """Return the summed cross-entropy of a step's answer tokens under the model of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for batch in step.micro:
            ids = torch.from_numpy(batch.input_ids)
            labels = torch.from_numpy(batch.labels)
            logits = model(input_ids=ids, attention_mask=torch.from_numpy(batch.attention_mask)).logits
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
                )
            )
    return total


def losses(rank, folder):
    """Return (case, loss in the engine, loss in transformers) of each tier and method, in one process."""
    from fedspeed.engine.world import join_world, leave_world, quiet

    quiet()
    join_world(LIMIT_S)
    step = random_step(4, 2, 2)
    found = []
    for (family, ends, method), kinds in CASES.items():
        base = write_ends(family, ends, folder / f"{family}-{ends}-{method}")
        expected = plain_loss(base, step)
        for kind in kinds:
            with engine(
                base, kind, adapter=METHODS[method], join=False, nvme=folder / "nvme"
            ) as client_engine:
                found.append((
                    f"{family} {ends} {method} {kind}",
                    client_engine.evaluate([step.micro])[0].loss,
                    expected,
                ))
                client_engine.close()
    leave_world()
    return found


def test_every_tier_and_method_has_the_losses_of_transformers(tmp_path):
    [found] = run_clusters([1], losses, tmp_path)
    assert len(found) == sum(map(len, CASES.values()))
    for case, loss, expected in found:
        assert loss == pytest.approx(expected, rel=1e-5), case


def piped(rank, folder, scope):
    """Return (loss in a pipeline, loss in transformers) of each base. The first rank writes the bases."""
    import torch
    from deepspeed import comm as dist

    from fedspeed.engine.world import join_world, leave_world, quiet

    torch.set_num_threads(1)
    quiet()
    join_world(LIMIT_S)
    step = random_step(4, 2, 2)
    found = []
    for ends in ENDS:
        base = folder / ends
        if rank == 0:
            write_ends("llama", ends, base)
        dist.barrier()
        clients = ((0, 1),) if scope == "client" else ((0,), (1,))
        with engine(
            str(base),
            "resident",
            clients=clients,
            adapter=METHODS["lora"],
            options=EngineConfig(pipeline=scope),
            join=False,
        ) as client_engine:
            client_engine.load(client_engine.state())
            with client_engine.matched_passes(1, backward=False):
                found.append((client_engine.evaluate([step.micro])[0].loss, plain_loss(str(base), step)))
    leave_world()
    return found


@pytest.mark.parametrize("scope", ["client", pytest.param("cluster", marks=pytest.mark.slow)])
def test_a_pipelines_ends_are_those_of_the_files(tmp_path, scope):
    first, *_ = run_clusters([2], piped, tmp_path, scope)
    for loss, expected in first:
        assert loss == pytest.approx(expected, rel=1e-5)

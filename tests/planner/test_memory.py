"""The memory model compared with real units of the base and real tensors that autograd keeps for a block."""

from dataclasses import replace

import numpy as np
import pytest

from fedspeed.models.catalogue import KNOWN, from_config, shape_of
from fedspeed.models.folded import fold
from fedspeed.planner.memory import (
    device_memory,
    head_bytes,
    kept_bytes,
    kept_count,
    memory_of,
    pinned_input_bytes,
    saved_per_token,
    sizes,
    streamed_bytes,
)
from fedspeed.planner.plan import Setting, Task
from fedspeed.planner.task import task_of
from tests.models.test_catalogue import config_of, meta
from tests.planner.cases import FIVE, HUB, one_profile
from tests.tiny import run_config

BLOCKS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 704,
        "vocab_size": 97,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "vocab_size": 97,
    },
    # Attention without dropout: with dropout a CPU keeps the scores, a GPU does not.
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_layer": 2,
        "n_head": 8,
        "vocab_size": 97,
        "n_positions": 256,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}
_SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "use_cache": False,
}
# Families whose blocks save something else. Rows of 128 tokens are longer than the windows of 32.
BLOCKS |= {
    "mistral": {**_SMALL, "model_type": "mistral", "sliding_window": 32},
    "qwen3": {**_SMALL, "model_type": "qwen3", "head_dim": 48},
    "qwen3_moe": {
        **_SMALL,
        "model_type": "qwen3_moe",
        "head_dim": 48,
        "moe_intermediate_size": 96,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "gemma3_text": {**_SMALL, "model_type": "gemma3_text", "head_dim": 48},
    "gemma3_text-windows": {**_SMALL, "model_type": "gemma3_text", "head_dim": 48, "sliding_window": 32},
    "phi3": {**_SMALL, "model_type": "phi3"},
    "phi3-windows": {**_SMALL, "model_type": "phi3", "sliding_window": 32},
    "olmo2": {**_SMALL, "model_type": "olmo2"},
    "smollm3": {**_SMALL, "model_type": "smollm3"},
    "granite": {**_SMALL, "model_type": "granite"},
    "llama-gelu_new": {**_SMALL, "model_type": "llama", "hidden_act": "gelu_new"},
    "gpt_neox": {**_SMALL, "model_type": "gpt_neox"},
    "gpt_neox-gelu_fast": {**_SMALL, "model_type": "gpt_neox", "hidden_act": "gelu_fast"},
    "gpt_neox-one-after-the-other": {**_SMALL, "model_type": "gpt_neox", "use_parallel_residual": False},
}
SETTINGS = [
    Setting("stock", 4, 1),
    Setting("stock", 4, 1, checkpointing=True),
    Setting("resident", 4, 1, block_inputs="device"),
    Setting("ram", 2, 2, resident_blocks=5, block_slots=2, client_slots=1, block_inputs="host"),
    Setting("nvme", 4, 1, resident_blocks=0, block_slots=3, client_slots=1, block_inputs="device"),
    Setting("client", 1, 4, resident_blocks=3, block_slots=2, client_slots=1, block_inputs="host"),
    Setting("cluster", 4, 1, resident_blocks=0, block_slots=1, client_slots=1, block_inputs="device"),
]
TASK = Task(shape_of(f"{HUB}Qwen-7B"), clients=1)


@pytest.mark.parametrize("name", FIVE)
def test_units_are_packed_as_predicted(name):
    """The model is on the meta device, so that real models can be compared."""
    import torch

    from fedspeed.engine.base.layout import frozen_units
    from fedspeed.models.adapters import add_adapter
    from fedspeed.models.config import AdapterConfig

    model = add_adapter(meta(config_of(KNOWN[name])).to(torch.bfloat16), AdapterConfig())
    found = {unit.name.rpartition(".")[2]: unit.nbytes for unit in frozen_units(model)}
    expected = sizes(KNOWN[name], 2)
    assert found["0"] == found[str(KNOWN[name].layers - 1)] == expected.block
    assert found.get("embed_tokens", found.get("wte")) == expected.embedding
    assert found.get("lm_head", 0) == expected.head


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_autograd_keeps_of_a_block(name, targets, dropout):
    real = saved_by_autograd(BLOCKS[name], targets, dropout, batch=2, tokens=128) / 256
    predicted = saved_per_token(
        Task(from_config(BLOCKS[name], name, name), 1, tokens=128, targets=targets, dropout=dropout)
    )
    assert predicted == pytest.approx(real, rel=0.05)


def test_cards_that_need_fp16_keep_keys_and_values_for_every_head():
    shape = TASK.shape
    more = saved_per_token(replace(TASK, dtype="fp16")) - saved_per_token(replace(TASK, dtype="bf16"))
    assert more == 2 * 2 * (shape.heads - shape.kv_heads) * shape.head_dim > 0


def saved_by_autograd(config, targets, dropout, batch, tokens):
    """Return the bytes of the tensors that a block's forward saves, without its parameters and its input.
    Rows are padded on the right and need no mask.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedspeed.engine.compute.micro_batches import _Recorder
    from fedspeed.models.adapters import add_adapter
    from fedspeed.models.blocks import anatomy
    from fedspeed.models.config import AdapterConfig

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model = add_adapter(model, AdapterConfig(targets=targets, dropout=dropout)).train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    parts = anatomy(model)
    entered = []
    calls = []
    setattr(
        parts.decoder, parts.blocks_name, torch.nn.ModuleList(_Recorder(entered, calls) for _ in parts.blocks)
    )
    with torch.no_grad():
        parts.decoder(inputs_embeds=torch.randn(batch, tokens, 256, dtype=torch.bfloat16))
    entry = entered[0].detach().requires_grad_()
    known.add(entry.untyped_storage().data_ptr())
    kept = []  # alive, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        parts.blocks[0](entry, *calls[0].args, **calls[0].kwargs)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(nbytes for address, nbytes in storages.items() if address not in known)


def test_what_waits_between_two_blocks():
    """Measure the executor with three micro-batches after their first block."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedspeed.data.batches import Batch
    from fedspeed.engine.activations import ActivationBudget
    from fedspeed.engine.base.layout import frozen_units
    from fedspeed.engine.compute.micro_batches import MicroBatchTask
    from fedspeed.engine.layer_major_executor import LayerMajorExecutor
    from fedspeed.models.adapters import add_adapter
    from fedspeed.models.blocks import anatomy
    from fedspeed.models.config import AdapterConfig

    model = add_adapter(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**BLOCKS["llama"]), dtype=torch.bfloat16),
        AdapterConfig(),
    )
    parts = anatomy(model)

    class Store:
        units = frozen_units(model)

        def begin(self, sequence):
            pass

        def rows(self, unit, name):
            return parts.embedding.weight

    ids = np.ones((2, 128), dtype=np.int64)
    mask = np.ones((2, 128), dtype=np.int64)
    stage = LayerMajorExecutor(model, parts, Store(), ActivationBudget(0.0, 1)).stage
    owner = dict(model.named_parameters())
    stage.begin([MicroBatchTask(Batch(ids, ids, mask, 1), 0) for _ in range(3)], [owner], (), train=False)
    waiting = {}
    for hidden in [stage.forward(m, 0, stage.embed(m)) for m in range(3)]:
        waiting[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage().nbytes()
    for calls in stage._calls.values():
        inputs = [v for call in calls for v in call.kwargs.values()]
        waiting |= {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in inputs
            if isinstance(t, torch.Tensor)
        }
    task = Task(from_config(BLOCKS["llama"], "llama", "llama"), 1, tokens=128)
    many = memory_of(task, Setting("resident", 2, 3000), one_profile()).gpu  # more than evaluation has there
    # Half of it. With inputs on the host, the device also has those of the first of the two blocks.
    assert many["between blocks"] / 2 * 3 / 3000 == pytest.approx(sum(waiting.values()), rel=0.05)
    few = memory_of(task, Setting("resident", 2, 3), one_profile()).gpu
    assert few["between blocks (evaluation)"] * 3 * 256 / 32_768 == pytest.approx(
        sum(waiting.values()), rel=0.05
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.tier}-{s.checkpointing}")
def test_fewer_tokens_never_take_more(setting):
    found = [
        memory_of(replace(TASK, tokens=tokens), setting, one_profile())
        for tokens in (8, 64, 256, 512, 1024, 4096)
    ]
    for of in ("gpu_bytes", "ram_bytes", "nvme_bytes"):
        numbers = [getattr(memory, of) for memory in found]
        assert numbers == sorted(numbers)
    assert found[0].gpu_bytes < found[-1].gpu_bytes


def test_a_resident_block_moves_from_one_memory_to_the_other():
    none, one = (memory_of(TASK, Setting("ram", 4, 1, resident), one_profile()) for resident in (0, 1))
    block = sizes(TASK.shape, 2).block
    assert one.gpu_bytes - none.gpu_bytes == block == none.ram_bytes - one.ram_bytes


def test_a_divided_base_costs_each_rank_its_part():
    setting = Setting("cluster", 4, 1)
    profile = one_profile()
    two = memory_of(TASK, setting, profile).gpu["share of the base"]
    eight = memory_of(TASK, setting, replace(profile, cluster_ranks=8)).gpu["share of the base"]
    assert two == streamed_bytes(TASK, setting) / 2 and eight == streamed_bytes(TASK, setting) / 8
    away = memory_of(replace(TASK, offload=True), setting, profile)
    assert "share of the base" not in away.gpu and away.ram["share of the base"] == 2 * two


def test_the_base_is_once_in_a_node_however_many_ranks():
    one, two = (memory_of(TASK, Setting("ram", 4, 1), one_profile(slots=slots)) for slots in (1, 2))
    assert one.ram["base"] == two.ram["base"]
    assert two.ram["processes"] == 2 * one.ram["processes"]


def test_reading_from_disk_takes_a_page_locked_buffer_a_rank():
    memory = memory_of(TASK, Setting("nvme", 4, 1), one_profile())
    # Twice the embedding's 1.09e9 bytes, each rounded up to a power of two, for each of two ranks.
    assert memory.ram["read buffers"] == 2 * 2 * 2**31
    assert memory.nvme == {"base": streamed_bytes(TASK, Setting("nvme", 4, 1))} and "base" not in memory.ram


def test_client_slots_have_an_adapter_each():
    profile = one_profile(slots=1, clients=4)
    one, four = (
        memory_of(TASK, Setting("ram", 4, 1, client_slots=client_slots), profile).gpu
        for client_slots in (1, 4)
    )
    assert four["masters and optimizer"] == 4 * one["masters and optimizer"]
    assert four["slots"] == one["slots"]


def test_waiting_inputs_lie_where_the_setting_says():
    deep = replace(TASK, tokens=2048, rows=16)
    host, device = (
        memory_of(deep, Setting("ram", 4, 4, block_inputs=where), one_profile())
        for where in ("host", "device")
    )
    assert host.ram["block inputs"] == 2 * 27 * 4 * pinned_input_bytes(deep, Setting("ram", 4, 4))
    # On the device nothing is rounded up. The inputs of two blocks are there always: in use and in transfer.
    assert device.gpu["between blocks"] - host.gpu["between blocks"] == (27 - 2) * 4 * 4 * 2048 * 3584 * 2
    assert (
        pinned_input_bytes(deep, Setting("ram", 4, 4)) == 2**26
    )  # 4 x 2048 x 3584 x 2 bytes, up to a power of two


def test_kept_activations_are_what_a_block_saves_of_a_micro_batch():
    """The inputs of these blocks stay on the device and need no memory on the host."""
    deep = replace(TASK, tokens=2048, rows=8)
    for where, beside in (("device", 0), ("host", 2 * 2048 * 3584 * 2)):
        plain = Setting("ram", 2, 4, block_inputs=where)
        five = replace(plain, activation_bytes=5 * kept_bytes(deep, plain) + 17)
        without, kept = (memory_of(deep, setting, one_profile()) for setting in (plain, five))
        saved = 5 * (2 * 2048 * saved_per_token(deep) + beside)
        assert kept.gpu["activations"] == saved and "activations" not in without.gpu
        assert kept.gpu_bytes - without.gpu_bytes == pytest.approx(1.08 * saved, abs=2)
        assert without.ram_bytes - kept.ram_bytes == (
            2 * 5 * pinned_input_bytes(deep, plain) if beside else 0
        )
    assert kept_count(deep, replace(plain, activation_bytes=2**60), 4) == 4 * 27  # all blocks but the last


def test_logits_come_in_larger_chunks_on_a_gpu():
    """Only the chunk of the head differs in bytes: rows of the vocabulary with their gradient and two fp32
    copies.
    """
    vocab = TASK.shape.vocab
    assert (
        head_bytes(TASK, 8192, "gpu") - head_bytes(TASK, 8192, "cpu")
        == ((1 << 28) // (2 * vocab) - (1 << 26) // (2 * vocab)) * vocab * 12
    )
    chosen = replace(TASK, logits_mib=64)
    assert head_bytes(chosen, 8192, "gpu") == head_bytes(TASK, 8192, "cpu")


def test_on_a_cpu_everything_is_ram():
    profile = one_profile()
    cpu = replace(
        profile, node=replace(profile.node, device=replace(profile.node.device, kind="cpu", memory=0))
    )
    memory = memory_of(TASK, Setting("resident", 4, 1, block_inputs="device"), cpu)
    assert (
        memory.gpu == {}
        and memory.ram["base"] == 2 * memory_of(TASK, Setting("resident", 4, 1), profile).gpu["base"]
    )


def test_a_full_fine_tune_divides_its_optimizer_at_stage_1():
    full = replace(TASK, method="full")
    whole, divided = (
        memory_of(replace(full, stage=stage), Setting("stock", 1, 4), one_profile()).gpu for stage in (0, 1)
    )
    assert whole["model"] == 2 * TASK.shape.total == divided["model"]
    assert whole["masters and optimizer"] == 12 * TASK.shape.total == 2 * divided["masters and optimizer"]


@pytest.mark.parametrize("count", [1, 4, 60])
def test_a_folded_adapter_grows_no_further_than_predicted(count):
    """The bytes of `stack` are exact, with factors and with the whole matrix."""
    shape = from_config(BLOCKS["llama"], "llama", "llama")
    config = run_config(
        federation={"method": {"name": "stack"}, "rounds": count},
        adapter={"lora_rank": 2},
        data={"clients": 3},
    )
    task = task_of(config, {}, shape, [])
    assert task.folded_rank == 6 * count
    folded = 0
    for linear in shape.adapted("attention"):
        parts = {}
        for _ in range(count):
            parts = fold(parts, np.zeros((linear.rows_out, 6)), np.zeros((6, linear.rows_in)))
        folded += shape.layers * sum(part.size for part in parts.values())
    persistent, _ = device_memory(task, SETTINGS[0], one_profile())
    assert persistent["folded adapter"] == folded * task.type_bytes
    assert "folded adapter" not in device_memory(replace(task, folded_rank=0), SETTINGS[0], one_profile())[0]


def test_scaled_and_capped_logits_and_masks_of_windows_are_counted():
    plain = from_config(BLOCKS["gemma3_text"], "g", "g")
    capped = from_config({**BLOCKS["gemma3_text"], "final_logit_softcapping": 30.0}, "g", "g")
    rows = int(0.5 * 128)
    more = [head_bytes(Task(shape, 1, tokens=128), 128, "cpu") for shape in (capped, plain)]
    assert more[0] - more[1] == rows * plain.vocab * 2 * 2
    windowed = from_config(BLOCKS["gemma3_text-windows"], "g", "g")
    setting = Setting("stock", 4, 1)
    sizes_of = [
        device_memory(Task(shape, 1, tokens=128), setting, one_profile())[1]["activations"]
        for shape in (windowed, plain)
    ]
    repeated = 2 * (windowed.heads - windowed.kv_heads) * windowed.head_dim
    masks = 4 * 128 * 128
    assert sizes_of[0] - sizes_of[1] == masks + windowed.layers * 4 * 128 * 2 * (repeated + 128)
    short = [device_memory(Task(shape, 1, tokens=32), setting, one_profile()) for shape in (windowed, plain)]
    assert short[0] == short[1]

"""Small decoder models for the tests of this room, and adapters drawn at random for them."""

from fedspeed.data.config import TrainConfig
from fedspeed.models.config import AdapterConfig
from tests.engine.engines import engine
from tests.tiny import random_step, write_llama

LORA = AdapterConfig(targets="all-linear")
LR = 1e-2
# AdamW takes steps of full length even where a gradient consists of rounding errors only, such as that of
# GPT-2's key bias, which cancels in the softmax. SGD takes steps in proportion to the gradient, so that two
# correct implementations stay close to each other.
DETERMINED = TrainConfig(optimizer="sgd", momentum=0.9, weight_decay=0.1)


def write_family(family: str, folder) -> str:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    if family == "llama":
        return write_llama(folder, layers=4)
    torch.manual_seed(0)
    common = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "qwen2":  # with both kinds of attention, so that blocks are called with different masks
        model = Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=2,
                max_position_embeddings=128,
                **common,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=64,
                n_layer=4,
                n_head=4,
                n_positions=128,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    model.save_pretrained(folder)
    return str(folder)


def stirred(state, seed=5):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {n: v + 0.02 * torch.randn(v.shape, generator=generator) for n, v in sorted(state.items())}


def losses_and_state(rank, base, kind, nvme):
    step = random_step(3, 2, 3)
    step.micro[1].attention_mask[0, -5:] = 0  # padding: the blocks' masks differ between micro-batches
    step.micro[1].labels[0, -5:] = -100
    with engine(base, kind, adapter=LORA, train=TrainConfig(optimizer="sgd"), nvme=nvme) as client_engine:
        client_engine.load(stirred(client_engine.state()))
        before = client_engine.evaluate([step.micro, step.micro[:1]])
        losses = [client_engine.train_step([step], 0.5)[0].loss for _ in range(3)]
        return before, losses, {n: v.detach().numpy() for n, v in client_engine.state().items()}


def drawn(state, scale=0.02, seed=5):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(state[n].shape, generator=generator) * scale for n in sorted(state)}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)

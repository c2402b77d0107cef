"""The tiny models of golden runs as Hugging Face folders: random weights, the same on every machine."""

from pathlib import Path

VOCABULARY = 260  # size of the built-in byte tokenizer's
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
BODY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _llama(folder: Path) -> None:
    from transformers import LlamaConfig

    _write(folder, LlamaConfig(**COMMON, **BODY, tie_word_embeddings=False))


def _qwen2(folder: Path) -> None:
    from transformers import Qwen2Config

    _write(folder, Qwen2Config(**COMMON, **BODY, tie_word_embeddings=True))


def _gpt2(folder: Path) -> None:
    from transformers import GPT2Config

    _write(folder, GPT2Config(**COMMON, n_embd=32, n_layer=4, n_head=4, n_positions=64))


def _write(folder: Path, config) -> None:
    """Write a model of this configuration with weights from numpy: norms near one, all others near zero."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng(11)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            drawn = torch.from_numpy(0.08 * rng.standard_normal(tuple(tensor.shape)).astype(np.float32))
            norm = tensor.dim() == 1 and name.endswith("weight")
            tensor.copy_(1 + drawn if norm else drawn)
    model.save_pretrained(folder)


BASES = {"llama": _llama, "qwen2": _qwen2, "gpt2": _gpt2}

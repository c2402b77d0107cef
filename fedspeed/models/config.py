"""What is trained: the base model, its numeric type, its tokenizer, and the trainable part."""

from dataclasses import dataclass, field
from typing import Literal

FAMILIES = ("llama", "qwen2", "gpt2")
# What adapter.targets stands for. GPT-2 fuses q, k and v into one matrix.
ATTENTION_TARGETS = {"gpt2": ["c_attn"]}
DEFAULT_ATTENTION_TARGETS = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class ModelConfig:
    base: str = field(default="", metadata={"help": "folder of a Hugging Face causal LM (config.json + *.safetensors), or a hub name"})
    init: Literal["pretrained", "random"] = field(default="pretrained", metadata={
        "help": "random: only config.json is read and the weights are drawn from run.seed"})
    dtype: Literal["fp32", "bf16", "fp16"] = field(default="bf16", metadata={
        "help": "numeric type of weights and arithmetic; fp32 masters are kept in every case"})
    tokenizer: str = field(default="auto", metadata={"help": "auto (the base's own), bytes (built in, 260 tokens), or a folder"})


@dataclass(frozen=True)
class AdapterConfig:
    method: Literal["lora", "full"] = field(default="lora", metadata={"help": "what is trained and exchanged"})
    lora_rank: int = field(default=8, metadata={"help": "r of LoRA", "min": 1, "max": 65_536})
    alpha: float = field(default=16.0, metadata={"help": "LoRA scale numerator; the update is alpha / lora_rank * B A", "above": 0.0})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input", "min": 0.0, "max": 0.99})
    targets: str = field(default="attention", metadata={
        "help": "attention (q and v), all-linear, or a comma-separated list of module names"})
    start_from: str = field(default="", metadata={"help": "PEFT folder to start from; empty: a fresh adapter"})

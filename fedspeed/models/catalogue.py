"""How large a model is, to the parameter, from its dimensions alone. No torch, no weights.

The dimensions come from a `config.json`, or from the table of models that FedSpeed was built for. Counts are
exact: the tests hold them against the models that transformers builds from the same configuration.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.files import json_value

FAMILIES = ("llama", "qwen2", "gpt2")
ATTENTION_TARGETS = {"gpt2": ("c_attn",)}  # GPT-2 fuses q, k and v into one matrix
DEFAULT_ATTENTION_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Linear:
    """A matrix of a decoder block under its module's name; sizes in elements."""

    name: str
    rows_in: int
    rows_out: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.rows_in * self.rows_out + self.bias * self.rows_out


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a causal LM.

    Attributes:
        family: one of FAMILIES, transformers' model_type.
        positions: length of a learned table of positions; 0 where positions are rotated into q and k.
        tied: the head is the embedding.
        attention_bias, output_bias, mlp_bias: whether q, k and v, the attention's output, and the MLP have
            biases.
    """

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int = 0
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The matrices of one block."""
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        h = self.hidden
        i = self.intermediate
        if self.family == "gpt2":
            return (
                Linear("c_attn", h, 3 * h, True),
                Linear("c_proj", h, h, True),
                Linear("c_fc", h, i, True),
                Linear("c_proj", i, h, True),
            )
        return (
            Linear("q_proj", h, q, self.attention_bias),
            Linear("k_proj", h, kv, self.attention_bias),
            Linear("v_proj", h, kv, self.attention_bias),
            Linear("o_proj", q, h, self.output_bias),
            Linear("gate_proj", h, i, self.mlp_bias),
            Linear("up_proj", h, i, self.mlp_bias),
            Linear("down_proj", i, h, self.mlp_bias),
        )

    @property
    def norm(self) -> int:
        """Parameters of one norm: LayerNorm has a bias, RMSNorm has none."""
        return 2 * self.hidden if self.family == "gpt2" else self.hidden

    @property
    def block(self) -> int:
        """Parameters of one decoder block."""
        return sum(linear.parameters for linear in self.linears) + 2 * self.norm

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head that are its own: none where it is tied."""
        return 0 if self.tied else self.embedding

    @property
    def beside(self) -> int:
        """Parameters outside blocks, embedding and head: the final norm, and GPT-2's table of positions."""
        return self.norm + self.positions * self.hidden

    @property
    def total(self) -> int:
        return self.layers * self.block + self.embedding + self.head + self.beside

    def adapted(self, targets: str | tuple[str, ...]) -> tuple[Linear, ...]:
        """The matrices of a block that a LoRA adapter stands beside.

        Args:
            targets: as in adapter.targets: attention, all-linear, or names.

        Raises:
            ModelError: a name that no block has.
        """
        if targets == "all-linear":
            return self.linears
        if targets == "attention":
            names = set(ATTENTION_TARGETS.get(self.family, DEFAULT_ATTENTION_TARGETS))
        else:
            # PEFT matches the end of a module's name, so `self_attn.q_proj` is `q_proj`.
            names = {
                name.removeprefix("self_attn.").removeprefix("mlp.").removeprefix("attn.") for name in targets
            }
        if unknown := sorted(names - {linear.name for linear in self.linears}):
            raise ModelError(
                f"adapter.targets: a block of {self.name} has no {', '.join(unknown)}; it has "
                f"{', '.join(dict.fromkeys(linear.name for linear in self.linears))}"
            )
        return tuple(linear for linear in self.linears if linear.name in names)

    def lora(self, targets: str | tuple[str, ...], lora_rank: int) -> int:
        """Parameters of a LoRA adapter on all blocks: A [r, in] and B [out, r] beside each matrix."""
        return self.layers * sum(
            lora_rank * (linear.rows_in + linear.rows_out) for linear in self.adapted(targets)
        )

    def folded(self, targets: str | tuple[str, ...], rank: int) -> int:
        """Values of a folded adapter of some rank beside the same matrices, none of which takes more than its
        matrix (models.folded).
        """
        sizes = [(linear.rows_in, linear.rows_out) for linear in self.adapted(targets)]
        return self.layers * sum(min(rank * (wide + out), wide * out) for wide, out in sizes)


def _qwen(
    name: str, hidden: int, layers: int, heads: int, kv_heads: int, *, intermediate: int, vocab: int
) -> ModelShape:
    return ModelShape(
        name,
        "qwen2",
        hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        vocab=vocab,
        tied=False,
        attention_bias=True,
    )


def _gpt3(size: str, hidden: int, layers: int, heads: int) -> ModelShape:
    return ModelShape(
        f"gpt3-{size}",
        "gpt2",
        hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        vocab=50257,
        tied=True,
        positions=2048,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


MAX_LAYERS = 1024
QUANTISED_BY = ("quantization_config", "compression_config")
KNOWN = {
    shape.name: shape
    for shape in (
        _qwen(
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
            1536,
            28,
            heads=12,
            kv_heads=2,
            intermediate=8960,
            vocab=151936,
        ),
        _qwen(
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
            3584,
            28,
            heads=28,
            kv_heads=4,
            intermediate=18944,
            vocab=152064,
        ),
        ModelShape(
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            "llama",
            4096,
            layers=32,
            heads=32,
            kv_heads=8,
            head_dim=128,
            intermediate=14336,
            vocab=128256,
            tied=False,
        ),
        _qwen(
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
            5120,
            48,
            heads=40,
            kv_heads=8,
            intermediate=13824,
            vocab=152064,
        ),
        # Brown et al., 2020, table 2.1, as GPT-2's architecture can hold them, whose heads divide the hidden
        # size: the table gives 1.3B 24 heads of 128 on 2048 (here 16) and 13B a hidden size of 5140 for 40
        # heads of 128 (here 5120).
        _gpt3("125m", 768, 12, 12),
        _gpt3("350m", 1024, 24, 16),
        _gpt3("760m", 1536, 24, 16),
        _gpt3("1.3b", 2048, 24, 16),
        _gpt3("2.7b", 2560, 32, 32),
        _gpt3("6.7b", 4096, 32, 32),
        _gpt3("13b", 5120, 40, 40),
    )
}


def shape_of(base: str) -> ModelShape:
    """The dimensions of `model.base`: a known name, a folder with config.json, or a config.json.

    Raises:
        ModelError: none of these, or a configuration of another architecture.
    """
    path = Path(base)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return from_config(_read(path), str(path.parent), str(path))
    by_name = {name.lower(): shape for name, shape in KNOWN.items()}
    if base.lower() in by_name:
        return by_name[base.lower()]
    if path.name == "config.json" and path.parent.is_dir():
        raise ModelError(
            f"{path}: no such file; name a folder with the config.json of a Hugging Face causal LM"
        )
    short = {name.rpartition("/")[2]: name for name in by_name}
    near = difflib.get_close_matches(base.lower().rpartition("/")[2], short, n=1)
    hint = f"did you mean {by_name[short[near[0]]].name}? " if near else ""
    raise ModelError(
        f"model {base!r} is neither a folder with config.json nor in the catalogue; {hint}Known are "
        f"{', '.join(KNOWN)}; of any other, "
        "give the folder or its config.json"
    )


def _read(path: Path) -> dict:
    try:
        config = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as a model configuration ({error}); copy the file again"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"{path}: not a model configuration but {type(config).__name__}; copy the file again"
        )
    return config


def from_config(config: Mapping, name: str, where: str) -> ModelShape:
    """The dimensions that a Hugging Face configuration states; keys it leaves out have transformers'
    defaults.

    Args:
        where: the file, for messages.

    Raises:
        ModelError: an unsupported architecture, or a missing or impossible number.
    """
    family = config.get("model_type")
    most = {"num_hidden_layers": MAX_LAYERS, "n_layer": MAX_LAYERS}
    if family not in FAMILIES:
        raise ModelError(f"{where}: model_type is {family!r}; FedSpeed knows {', '.join(FAMILIES)}")
    for key in QUANTISED_BY:
        if config.get(key) is not None:
            raise ModelError(
                f"{where}: {key} says that the weights are quantised, which FedSpeed does not read; take "
                "the unquantised original, or "
                "dequantise the model in transformers (model.dequantize(), or dequantize=True in its "
                "quantization config) and write it "
                "with save_pretrained"
            )

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most.get(key, 1 << 24):
            raise ModelError(
                f"{where}: {key} is {value!r}, but must be a whole number from 1 to "
                f"{most.get(key, 1 << 24)}; give a complete config.json"
            )
        return value

    def flag(key: str, default: bool) -> bool:
        value = config.get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{where}: {key} is {value!r}, but must be true or false; correct the file")
        return value

    if family == "gpt2":
        hidden = number("n_embd")
        heads = number("n_head")
        shape = ModelShape(
            name,
            family,
            hidden,
            layers=number("n_layer"),
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            intermediate=number("n_inner", 4 * hidden),
            vocab=number("vocab_size"),
            tied=flag("tie_word_embeddings", True),
            positions=number("n_positions", 1024),
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
        )
    else:
        hidden = number("hidden_size")
        heads = number("num_attention_heads")
        bias = family == "llama" and flag("attention_bias", False)
        kv_heads = 32 if family == "qwen2" and "num_key_value_heads" not in config else heads
        shape = ModelShape(
            name,
            family,
            hidden,
            layers=number("num_hidden_layers"),
            heads=heads,
            kv_heads=number("num_key_value_heads", kv_heads),
            head_dim=number("head_dim", hidden // heads),
            intermediate=number("intermediate_size"),
            vocab=number("vocab_size"),
            tied=flag("tie_word_embeddings", False),
            attention_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=family == "llama" and flag("mlp_bias", False),
        )
    if hidden % heads and config.get("head_dim") is None:
        raise ModelError(f"{where}: {heads} heads do not divide a hidden size of {hidden}")
    if heads % shape.kv_heads:
        raise ModelError(
            f"{where}: num_key_value_heads={shape.kv_heads} does not divide num_attention_heads={heads}"
        )
    return shape

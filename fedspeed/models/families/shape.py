"""The dimensions of a causal LM and the parameters they imply. No torch, no weights."""

from dataclasses import dataclass, field

from fedspeed.errors import ModelError
from fedspeed.models.families.experts import NOT_LINEAR, Experts
from fedspeed.units import parameters_text

BLOCK_INPUT = "block input"


@dataclass(frozen=True)
class Linear:
    """Describe a linear module of a decoder block; sizes in elements.

    Attributes:
        path: the module's name below the block, such as "self_attn.q_proj".
        reads: name of the tensor that it reads. Modules of one block that name the same one share an input;
            BLOCK_INPUT is the block's own.
        transposed: whether its weight is stored [in, out], not [out, in].
    """

    path: str
    rows_in: int
    rows_out: int
    bias: bool = False
    reads: str = ""
    transposed: bool = False

    @property
    def name(self) -> str:
        """Return the last part of the path, which `adapter.targets` names."""
        return self.path.rpartition(".")[2]

    @property
    def parameters(self) -> int:
        """Count the elements of the weight and the bias."""
        return self.rows_in * self.rows_out + self.bias * self.rows_out


@dataclass(frozen=True)
class Norm:
    """Describe a norm with a weight of `size` elements and, for LayerNorm, a bias.

    Attributes:
        path: the module's name below its block, or below the decoder.
        width: elements a token that it normalises, where these are several groups of `size`, as in a norm of
            each attention head; 0: one group.
    """

    path: str
    size: int
    bias: bool = False
    width: int = 0

    @property
    def parameters(self) -> int:
        """Count the elements of the weight and the bias."""
        return self.size * (1 + self.bias)

    @property
    def elements(self) -> int:
        """Count the elements a token that it normalises."""
        return self.width or self.size


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a causal LM, whatever its family. All decoder blocks have the same modules.

    Attributes:
        family: transformers' model_type, a key of FAMILIES.
        tied: whether the head is the embedding.
        positions: length of the learned table of positions; 0 where positions are rotated into q and k.
        window, windowed: length of the sliding window in tokens, and the number of blocks that have one.
        parallel: whether attention and MLP read the same input, and are added to it together.
        dropout_masks: masks over the hidden size that dropout saves in a block, a byte an element.
        activation_copies: tensors of the size `intermediate` that the MLP's activation function saves besides
            its input.
        logits_copies: tensors of the logits' size that scaling or capping the logits takes besides them.
        intermediate: elements a token inside the MLP, or inside all experts that compute the token.
        linears, norms: the modules of one decoder block, in the order of its state dict.
        experts: what a block has in place of an MLP; None where it has one.
        final_norm: the norm between the last block and the head.
        attention_targets: names of the linear modules that `adapter.targets=attention` means.
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
    window: int = 0
    windowed: int = 0
    parallel: bool = False
    dropout_masks: int = 0
    activation_copies: int = 0
    logits_copies: int = 0
    # Hashes leave these out: they follow from the family and the numbers above, nearly always.
    linears: tuple[Linear, ...] = field(default=(), hash=False, repr=False)
    norms: tuple[Norm, ...] = field(default=(), hash=False, repr=False)
    experts: Experts | None = field(default=None, hash=False, repr=False)
    final_norm: Norm = field(default=Norm("norm", 0), hash=False, repr=False)
    attention_targets: tuple[str, ...] = field(default=(), hash=False, repr=False)

    @property
    def block(self) -> int:
        """Count the parameters of one decoder block, all of which are stored and loaded."""
        return self._dense + (self.experts.parameters if self.experts else 0)

    @property
    def active_block(self) -> int:
        """Count the parameters of one decoder block that compute a token: not those of the other experts."""
        return self._dense + (self.experts.active if self.experts else 0)

    @property
    def _dense(self) -> int:
        matrices = sum(linear.parameters for linear in self.linears)
        return matrices + sum(norm.parameters for norm in self.norms)

    @property
    def matrices(self) -> int:
        """Count the elements of a block's weights that have two or more dimensions."""
        inside = sum(linear.rows_in * linear.rows_out for linear in self.linears)
        return inside + (self.experts.parameters if self.experts else 0)

    @property
    def embedding(self) -> int:
        """Count the parameters of the token embedding."""
        return self.vocab * self.hidden

    @property
    def head(self) -> int:
        """Count the parameters of a head apart from the embedding: none where it is tied."""
        return 0 if self.tied else self.embedding

    @property
    def other(self) -> int:
        """Count the parameters outside blocks, embedding and head: final norm and table of positions."""
        return self.final_norm.parameters + self.positions * self.hidden

    @property
    def total(self) -> int:
        """Count all parameters, tied ones once."""
        return self.layers * self.block + self.embedding + self.head + self.other

    @property
    def active(self) -> int:
        """Count the parameters that compute a token: all of them in a model without experts."""
        return self.total - self.layers * (self.block - self.active_block)

    @property
    def size_text(self) -> str:
        """Write for people how many parameters there are, and how many compute a token if that is fewer."""
        text = f"{parameters_text(self.total)} parameters"
        if self.experts is None:
            return text
        chosen = f"{self.experts.per_token} of {self.experts.count} experts a block"
        return f"{text}, {parameters_text(self.active)} of them active in a token ({chosen})"

    def adapted(self, targets: str | tuple[str, ...]) -> tuple[Linear, ...]:
        """Return the linear modules of a block to which LoRA adds an adapter.

        Args:
            targets: as in adapter.targets: attention, all-linear, or names.

        Raises:
            ModelError: a name that no block has.
        """
        if targets == "all-linear":
            return self.linears
        # PEFT matches whole parts of a path from its end, so `self_attn.q_proj` and `q_proj` mean the same.
        names = self.attention_targets if targets == "attention" else targets
        known = [(linear, f".{linear.path}") for linear in self.linears]
        if unknown := sorted(
            name for name in set(names) if not any(path.endswith(f".{name}") for _, path in known)
        ):
            raise ModelError(
                f"adapter.targets: a block of {self.name} has no {', '.join(unknown)}; it has "
                f"{self.linears_text}"
            )
        return tuple(linear for linear, path in known if any(path.endswith(f".{name}") for name in names))

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Return the names of a block's linear modules, each once."""
        return tuple(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def linears_text(self) -> str:
        """List a block's linear modules for a message, and say why others have no adapter."""
        names = ", ".join(self.linear_names)
        return f"{names} ({NOT_LINEAR})" if self.experts else names

    def lora(self, targets: str | tuple[str, ...], lora_rank: int) -> int:
        """Count the parameters of a LoRA adapter on all blocks: A [r, in] and B [out, r] for each matrix."""
        return self.layers * sum(
            lora_rank * (linear.rows_in + linear.rows_out) for linear in self.adapted(targets)
        )

    def folded(self, targets: str | tuple[str, ...], rank: int) -> int:
        """Count the values of a folded adapter of some rank on the same matrices; for none of them it takes
        more than the matrix itself (models.folded).
        """
        sizes = [(linear.rows_in, linear.rows_out) for linear in self.adapted(targets)]
        return self.layers * sum(min(rank * (wide + out), wide * out) for wide, out in sizes)

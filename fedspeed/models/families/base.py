"""What FedSpeed has to know of a model family. Importing it loads no torch: only functions that are given
tensors work with them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedspeed.errors import ModelError
from fedspeed.models.families.experts import Shape, Stacked
from fedspeed.models.families.shape import Linear, ModelShape, Norm
from fedspeed.models.families.values import ConfigValues

if TYPE_CHECKING:
    from torch import Tensor


def unchanged(tensor: "Tensor", config: Any) -> "Tensor":
    """Return the tensor: the family neither scales nor caps it."""
    return tensor


def soft_capped(tensor: "Tensor", config: Any) -> "Tensor":
    """Cap logits softly at `final_logit_softcapping`, if the model has it, in the steps of transformers."""
    cap = config.final_logit_softcapping
    return tensor if cap is None else (tensor / cap).tanh() * cap


@dataclass(frozen=True, kw_only=True)
class PositionTable:
    """A learned table of positions: its parameter, and the key of its length in config.json with
    transformers' default.
    """

    parameter: str
    key: str
    default: int


@dataclass(frozen=True)
class SavedBytes:
    """What decides, besides the shape, how many bytes autograd saves of a block.

    Attributes:
        type_bytes: of one number in the model's type.
        kv_heads: heads of keys and values as attention saves them: it repeats them for each head of q on
            cards before Ampere, and where it is given a mask.
    """

    type_bytes: int
    kv_heads: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family as transformers implements it. Parameter names are those of transformers' modules.

    Attributes:
        model_type: in config.json.
        architecture: the class of the causal LM in transformers.
        decoder: prefix of the decoder's parameters, which some files leave out.
        blocks: prefix of the blocks' parameters below the decoder, before the block's number.
        embedding, head: full names of the weights of the token embedding and of the head.
        stored_as: parameter -> another name that it has in files.
        stacked: parameters that files may hold in several matrices; empty without experts.
        final_norm: attribute of the decoder that holds the norm before the head.
        table: the learned table of positions; None where positions are rotated into q and k.
        read_as_longrope: other rotary types that transformers takes for longrope.
        original_positions: transformers' default of original_max_position_embeddings.
        positions_are_scaled: whether max_position_embeddings counts the scaled positions already.
        attention_targets: names of the linear modules that `adapter.targets=attention` means.
        transposed: whether weights of linear modules are stored [in, out] (PEFT: fan_in_fan_out).
        shape: from the values of a config.json and the model's name to its dimensions. Refuses with a
            ModelError what FedSpeed cannot train exactly.
        saved_bytes_per_token: bytes that autograd saves of one block for each token, its parameters, its
            input and what adapters read aside.
        embed: applied to the rows [B, T, hidden] that were looked up in the embedding's weight, given the
            model's config: what transformers' embedding module does after the look-up.
        logits: applied to the head's output [..., vocab]: what transformers' causal LM does after the head.
        masks: what a token attends to. causal: in every block all tokens up to itself, whatever config.json
            says of windows. window: in every block the last `sliding_window` tokens, all where that is not
            set. layers: in each block what its entry of `layer_types` says.
    """

    model_type: str
    architecture: str
    decoder: str = "model."
    blocks: str = "layers."
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    stored_as: tuple[tuple[str, str], ...] = ()
    stacked: tuple[Stacked, ...] = ()
    final_norm: str = "norm"
    table: PositionTable | None = None
    read_as_longrope: tuple[str, ...] = ()
    original_positions: int = 0
    positions_are_scaled: bool = False
    attention_targets: tuple[str, ...] = ("q_proj", "v_proj")
    transposed: bool = False
    shape: Callable[[ConfigValues, str], ModelShape]
    saved_bytes_per_token: Callable[[ModelShape, SavedBytes], int]
    embed: Callable[["Tensor", Any], "Tensor"] = unchanged
    logits: Callable[["Tensor", Any], "Tensor"] = unchanged
    masks: Literal["causal", "window", "layers"] = "causal"

    def parameters(self, shape: ModelShape) -> Iterator[tuple[str, Shape]]:
        """Yield the name and the shape of every parameter once; a tied head is the embedding."""
        yield self.embedding, (shape.vocab, shape.hidden)
        if self.table is not None:
            yield self.table.parameter, (shape.positions, shape.hidden)
        for number in range(shape.layers):
            block = f"{self.decoder}{self.blocks}{number}."
            for linear in shape.linears:
                yield from _linear(block, linear)
            for name, sizes in shape.experts.tensors() if shape.experts else ():
                yield block + name, sizes
            for norm in shape.norms:
                yield from _norm(block, norm)
        yield from _norm(self.decoder, shape.final_norm)
        if not shape.tied:
            yield self.head, (shape.vocab, shape.hidden)

    def check_trained(self, method: str) -> None:
        """Refuse to train the experts themselves.

        Args:
            method: value of adapter.method.

        Raises:
            ModelError: the family has experts, and the method trains weights of the base.
        """
        if self.stacked and method != "lora":
            raise ModelError(
                f"adapter.method={method}: {self.model_type} is a mixture of experts, whose base stays "
                "frozen in FedSpeed: gradients and optimizer states of all experts are not planned for, and "
                "the model would be exported with stacked experts; set adapter.method=lora"
            )

    def matrices_of(self, name: str, shape: Shape) -> tuple[tuple[str, ...], Shape]:
        """Return (names, shape of each) of the matrices that files may hold in place of a parameter; no names
        where it is never divided.
        """
        for stacked in self.stacked:
            if name.endswith(stacked.parameter):
                return stacked.names(name, shape[0]), stacked.shape(shape)
        return (), ()

    @property
    def outside_blocks(self) -> tuple[str, ...]:
        """Return the names of the modules outside the blocks to which an adapter could be added."""
        tables = (self.table.parameter,) if self.table is not None else ()
        return tuple(name.split(".")[-2] for name in (self.embedding, *tables, self.head))


def _linear(prefix: str, linear: Linear) -> Iterator[tuple[str, Shape]]:
    matrix = (linear.rows_out, linear.rows_in)
    yield f"{prefix}{linear.path}.weight", matrix[::-1] if linear.transposed else matrix
    if linear.bias:
        yield f"{prefix}{linear.path}.bias", (linear.rows_out,)


def _norm(prefix: str, norm: Norm) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}{norm.path}.weight", (norm.size,)
    if norm.bias:
        yield f"{prefix}{norm.path}.bias", (norm.size,)

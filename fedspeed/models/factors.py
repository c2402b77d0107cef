"""Which tensors of a LoRA adapter are the factors of a product. Names only, so that whoever aggregates arrays
needs no model.

A LoRA beside a matrix is B A. Beside an embedding PEFT calls the factors lora_embedding_A [r, vocabulary] and
lora_embedding_B [hidden, r], and there too the product is B A. With PEFT's `lora_bias` B has a bias, which
belongs to B's side and to no product.
"""

from collections.abc import Iterable

KINDS = ((".lora_A", ".lora_B"), (".lora_embedding_A", ".lora_embedding_B"))


def is_factor_a(name: str) -> bool:
    """Whether a tensor is the factor A of a product, by its parameter's name or by the one in a PEFT file."""
    return any(f"{a}." in f"{name}." for a, _ in KINDS)


def is_factor_b(name: str) -> bool:
    """Whether a tensor is the factor B of a product, or the bias that stands beside it."""
    return any(f"{b}." in f"{name}." for _, b in KINDS)


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The (A, B) names of every adapted matrix and embedding, in sorted order."""
    found = []
    for name in sorted(names):
        for a, b in KINDS:
            if f"{a}." in f"{name}.":
                found.append((name, f"{name}.".replace(f"{a}.", f"{b}.").removesuffix(".")))
    return found

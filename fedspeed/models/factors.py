"""The factors of the products in a LoRA adapter, by the names of its tensors, so that aggregation needs no
model.

The product of an adapted matrix is B A. For an embedding PEFT calls the factors lora_embedding_A
[r, vocabulary] and lora_embedding_B [hidden, r], and the product is B A too. With PEFT's `lora_bias` B has a
bias, which is treated like B but is part of no product.
"""

from collections.abc import Iterable

KINDS = ((".lora_A", ".lora_B"), (".lora_embedding_A", ".lora_embedding_B"))


def is_factor_a(name: str) -> bool:
    """Tell whether a tensor is the factor A of a product, by the name of its parameter or in a PEFT file."""
    return any(f"{a}." in f"{name}." for a, _ in KINDS)


def is_factor_b(name: str) -> bool:
    """Tell whether a tensor is the factor B of a product, or its bias."""
    return any(f"{b}." in f"{name}." for _, b in KINDS)


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the names (A, B) of the factors of every adapted matrix and embedding, sorted."""
    found = []
    for name in sorted(names):
        for a, b in KINDS:
            if f"{a}." in f"{name}.":
                found.append((name, f"{name}.".replace(f"{a}.", f"{b}.").removesuffix(".")))
    return found

"""LoRA ranks that differ between clients (`adapter.rank_by_client`): states of one rank for engines and
clients of another.

The common state has the largest rank R = adapter.lora_rank. All adapters have its scale s = alpha / R,
whatever their own rank, so that their products B A can be compared and added. The product of A's first r rows
and B's first r columns is the leading part of the common product; what it leaves out is a product too, which
a smaller client or engine has as a folded adapter (`models.folded`), so that it computes with the whole
common model and trains the leading part.

An engine may have a larger rank than a client that it carries. The client's A then has rows of zeros, and B
columns of zeros, beyond its own rank. The gradient of such a row of A is a multiple of B's column, and the
other way round. Both are zero, and with any optimizer and weight decay they stay zero.

Pure functions of arrays, without torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from fedspeed.models.config import AdapterConfig
from fedspeed.models.factors import is_factor_a, is_factor_b, pairs
from fedspeed.models.folded import rank_of, trainable, with_folded

Arrays = Mapping[str, np.ndarray]


def client_ranks(adapter: AdapterConfig, clients: int) -> tuple[int, ...]:
    """Return the LoRA rank of every client, by client number.

    Args:
        adapter: whose rank_by_client is not `auto` any more. clients: their number.
    """
    assert adapter.rank_by_client != "auto", "adapter.rank_by_client=auto is resolved before"
    return tuple(adapter.rank_by_client.get(str(client), adapter.lora_rank) for client in range(clients))


def unequal_ranks(adapter: AdapterConfig, clients: int) -> tuple[int, ...]:
    """Return the LoRA rank of every client; empty where adapter.rank_by_client names none, or is not resolved
    yet.
    """
    if not adapter.rank_by_client or adapter.rank_by_client == "auto":
        return ()
    return client_ranks(adapter, clients)


def ranks_text(lora_ranks: Sequence[int], first: int = 0) -> str:
    """Return the LoRA ranks of clients with consecutive numbers as text: `client 0: 16, clients 1 to 3: 4`.

    Args:
        first: number of the first of the clients.
    """
    parts = []
    for lora_rank, same in groupby(lora_ranks):
        last = first + len(list(same)) - 1
        numbers = f"client {first}" if first == last else f"clients {first} to {last}"
        parts.append(f"{numbers}: {lora_rank}")
        first = last + 1
    return ", ".join(parts)


def of_rank(adapter: AdapterConfig, lora_rank: int) -> AdapterConfig:
    """Return the adapter of an engine of another rank, with the scale of the common one."""
    return replace(
        adapter, lora_rank=lora_rank, alpha=adapter.alpha * lora_rank / adapter.lora_rank, rank_by_client={}
    )


def shape_of_rank(name: str, shape: Sequence[int], lora_rank: int) -> tuple[int, ...]:
    """Return the shape that a trained array has with another LoRA rank: A is [r, in], B is [out, r], and the
    bias of a B does not depend on r.
    """
    if is_factor_a(name):
        return (lora_rank, *shape[1:])
    return (shape[0], lora_rank) if is_factor_b(name) and len(shape) == 2 else tuple(shape)


def leading(state: Arrays, lora_rank: int) -> dict[str, np.ndarray]:
    """Return a state with the first rows of A and the first columns of B only; the rest of their product is
    left out. The other arrays are those of `state`.
    """
    if rank_of(state) <= lora_rank:
        return dict(state)
    shapes = {name: shape_of_rank(name, array.shape, lora_rank) for name, array in state.items()}
    return {
        name: np.ascontiguousarray(array[tuple(map(slice, shapes[name]))]) for name, array in state.items()
    }


def cut(state: Arrays, lora_rank: int) -> dict[str, np.ndarray]:
    """Return a state with factors of a smaller rank and the same products: what the leading part leaves out
    is added to the folded arrays, unless it is zero.
    """
    if rank_of(state) <= lora_rank:
        return dict(state)
    rest = {a: (state[b][:, lora_rank:], state[a][lora_rank:]) for a, b in pairs(trainable(state))}
    products = {a: (left, right) for a, (left, right) in rest.items() if left.any() and right.any()}
    return leading(trainable(state), lora_rank) | with_folded(state, products)


def padded(state: Arrays, lora_rank: int) -> dict[str, np.ndarray]:
    """Return a state with factors of a larger rank and the same products: rows and columns of zeros are
    appended.
    """
    if rank_of(state) >= lora_rank:
        return dict(state)
    shapes = {name: shape_of_rank(name, array.shape, lora_rank) for name, array in state.items()}
    return {name: _with_zeros(array, shapes[name]) for name, array in state.items()}


def _with_zeros(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return an array of a larger shape with zeros appended; the same array if it has that shape."""
    missing = [larger - size for larger, size in zip(shape, array.shape)]
    return np.pad(array, [(0, count) for count in missing]) if any(missing) else array


def fitted(state: Arrays, lora_rank: int) -> dict[str, np.ndarray]:
    """Return a state with factors of a rank and the same products; see `cut` and `padded`."""
    return padded(state, lora_rank) if rank_of(state) < lora_rank else cut(state, lora_rank)

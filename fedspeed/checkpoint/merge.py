"""Merging of an adapter into its base, a file of the base at a time, as an ordinary Hugging Face folder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedspeed.errors import ModelError
from fedspeed.models.base_files import check_base, fit
from fedspeed.models.factors import pairs
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.importing.shards import write_tensors
from fedspeed.models.importing.tensors import SafetensorFiles
from fedspeed.models.loading import WeightFiles
from fedspeed.models.numeric_types import TORCH_NAMES
from fedspeed.models.saved_adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_config


@dataclass(frozen=True)
class Product:
    """The product B A of an adapter that is added to one matrix.

    Attributes:
        factor_a, factor_b: names in the adapter's file. scale: alpha / r. transposed: whether the matrix is
            stored as [in, out], as an embedding and GPT-2's matrices are.
    """

    factor_a: str
    factor_b: str
    scale: float
    transposed: bool


class MergedTensors:
    """The tensors of a base with an adapter's products added, in fp32 where something was added.

    Args:
        base: its folder. adapter: its PEFT folder; None: the base as it is.

    Raises:
        ModelError: files are missing or damaged, or the adapter cannot be merged into this base.
    """

    def __init__(self, base: Path, adapter: Path | None):
        shape, stored, _ = check_base(base)
        family = FAMILIES[shape.family]
        self._files = SafetensorFiles(base, None)
        self._factors = WeightFiles(adapter, WEIGHTS_FILE) if adapter else None
        fitted = fit(stored, dict(family.parameters(shape)), family, base)
        keys = {name: found[0] for name, found in fitted.keys.items() if len(found) == 1}
        parameters = {}
        if adapter and self._factors:
            paths = tuple(f".{linear.path}.weight" for linear in shape.linears if linear.transposed)
            parameters = _products(adapter, self._factors, paths)
        # An adapter on one of two tied matrices makes them differ.
        self.unties = shape.tied and not {family.embedding, family.head}.isdisjoint(parameters)
        if self.unties:
            self._head = (family.head, keys[family.embedding])
            keys[family.head] = family.head
        if self.unties and self._head[1] == family.head:
            raise ModelError(
                f"{base}: holds its embedding by the name of the head only, and {adapter} makes them differ; "
                "merge it in PEFT (merge_and_unload)"
            )
        if strange := sorted(parameters.keys() - keys.keys()):
            raise ModelError(
                f"{adapter}: is on {strange[0]}, which {base} does not hold as one matrix; merge it in "
                "PEFT (merge_and_unload)"
            )
        self._products = {keys[name]: product for name, product in parameters.items()}

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the base's files."""
        names = self._files.names()
        return names + ([self._head[0]] if self.unties and self._head[0] not in names else [])

    def is_dequantised(self, name: str) -> bool:
        """Return False: the base's weights are plain."""
        return False

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor of the merged model."""
        is_head = self.unties and name == self._head[0]
        tensor = self._files.read(self._head[1] if is_head else name)
        product = self._products.get(name)
        return tensor if product is None else tensor.float() + self._delta(product)

    def _delta(self, product: Product) -> torch.Tensor:
        assert self._factors is not None, "products are of an adapter"
        first, second = (
            self._factors.read(name, torch.Size(self._factors.shape(name))).float()
            for name in (product.factor_a, product.factor_b)
        )
        delta = product.scale * (second @ first)
        return delta.T if product.transposed else delta


def _products(adapter: Path, factors: WeightFiles, transposed: tuple[str, ...]) -> dict[str, Product]:
    """Return the products of an adapter by the parameter of the base that each changes.

    Args:
        transposed: ends of the names of matrices that the base stores as [in, out].

    Raises:
        ModelError: it has biases, which some bases have no place for.
    """
    saved = read_config(adapter)
    if saved.get("lora_bias"):
        raise ModelError(
            f"{adapter / CONFIG_FILE}: lora_bias=true gives modules a bias that the base may not have; merge "
            "it in PEFT (merge_and_unload)"
        )
    rank = saved["r"]
    scale = saved["lora_alpha"] / (math.sqrt(rank) if saved.get("use_rslora") else rank)
    found = {}
    for factor_a, factor_b in pairs(factors.names()):
        module = factor_a.partition(".lora_")[0].removeprefix(PREFIX)
        name = f"{module}.weight"
        is_transposed = ".lora_embedding_A" in factor_a or name.endswith(transposed)
        found[name] = Product(factor_a, factor_b, scale, is_transposed)
    return found


def write_merged(
    folder: Path, tensors: MergedTensors, config: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Write the weights of a merged model; return the values of its config.json.

    Args:
        config: values of the base's config.json. dtype: fp32, bf16 or fp16, of all tensors.

    Raises:
        ModelError: a tensor is not finite, perhaps in this dtype only.
    """
    write_tensors(folder, tensors, dtype, dtype)
    values = {key: value for key, value in config.items() if key not in ("torch_dtype", "_name_or_path")}
    values |= {"dtype": TORCH_NAMES[dtype], "use_cache": True}
    return values | ({"tie_word_embeddings": False} if tensors.unties else {})

"""Checked reading of a model's config.json."""

from collections.abc import Mapping
from typing import Any, NoReturn

from fedspeed.errors import ModelError

MAX_LAYERS = 1024
# Tensors of the MLP's inner size that autograd saves of an activation function besides its input: those that
# torch computes in one step save none. By transformers' names; of others, the most is assumed.
ACTIVATION_COPIES = {
    "silu": 0,
    "swish": 0,
    "gelu": 0,
    "gelu_pytorch_tanh": 0,
    "relu": 0,
    "gelu_new": 3,
    "gelu_fast": 6,
}
MAX_SIZE = 1 << 24


class ConfigValues:
    """The values of a config.json. Keys that it leaves out, and keys that are null, have defaults.

    Args:
        values: as parsed. file: its path, for messages.
    """

    def __init__(self, values: Mapping[str, Any], file: str):
        self._values = values
        self.file = file

    def get(self, key: str) -> Any:
        """Return a value as it is, None where the file leaves it out."""
        return self._values.get(key)

    def number(self, key: str, default: int | None = None, *, least: int = 1, largest: int = MAX_SIZE) -> int:
        """Return a whole number from `least` to `largest`.

        Raises:
            ModelError: it is something else, or left out without a default.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= largest:
            raise ModelError(
                f"{self.file}: {key} is {value!r}, but must be a whole number from {least} to {largest}; "
                "give "
                "a complete config.json"
            )
        return value

    def layers(self) -> int:
        """Return the number of decoder blocks."""
        return self.number("num_hidden_layers", largest=MAX_LAYERS)

    def optional_number(self, key: str, default: int) -> int:
        """Return a whole number; 0 where it is null. `default`: where it is left out."""
        if key in self._values and self._values[key] is None:
            return 0
        return self.number(key, default) if key in self._values or default else 0

    def has(self, key: str) -> bool:
        """Tell whether the file has a key, be it null."""
        return key in self._values

    def windowed_blocks(self, default: int) -> int:
        """Count the blocks with a sliding window in `layer_types`; `default`: where it is left out.

        Raises:
            ModelError: it does not name a known kind of attention for each block.
        """
        kinds = self._values.get("layer_types")
        if kinds is None:
            return default
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != self.layers() or any(k not in known for k in kinds):
            raise ModelError(
                f"{self.file}: layer_types is {kinds!r}, but must say {' or '.join(known)} for each of the "
                f"{self.layers()} blocks; correct the file"
            )
        return kinds.count("sliding_attention")

    def check_no_window(self) -> None:
        """Raise ModelError where layer_types names sliding windows that the other keys leave out."""
        if self.windowed_blocks(0):
            self.refuse(
                "layer_types",
                "it names sliding_attention, but use_sliding_window is not true or sliding_window is not set",
                "correct one of them",
            )

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false; null means the default.

        Raises:
            ModelError: it is something else.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ModelError(f"{self.file}: {key} is {value!r}, but must be true or false; correct the file")
        return value

    def activation_copies(self, key: str, default: str) -> int:
        """Return how many tensors of the MLP's inner size autograd saves of its activation function (see
        ACTIVATION_COPIES).

        Raises:
            ModelError: its name is no text.
        """
        name = self._values.get(key)
        name = default if name is None else name
        if not isinstance(name, str):
            raise ModelError(
                f"{self.file}: {key} is {name!r}, but must name an activation function; correct the file"
            )
        return ACTIVATION_COPIES.get(name, max(ACTIVATION_COPIES.values()))

    def head_width(self, hidden: int, heads: int, default: int | None = None) -> int:
        """Return head_dim, by default the hidden size divided by the heads.

        Raises:
            ModelError: it is no size, or left out where the heads do not divide the hidden size.
        """
        if self._values.get("head_dim") is None and default is None:
            self.check_heads(hidden, heads)
        return self.number("head_dim", default or hidden // heads)

    def check_heads(self, hidden: int, heads: int) -> None:
        """Raise ModelError where the heads do not divide the hidden size."""
        if hidden % heads:
            raise ModelError(f"{self.file}: {heads} heads do not divide a hidden size of {hidden}")

    def kv_heads(self, heads: int, default: int | None = None) -> int:
        """Return num_key_value_heads; null means as many as heads.

        Args:
            default: of transformers, where the file leaves the key out.

        Raises:
            ModelError: it does not divide the heads.
        """
        left_out = "num_key_value_heads" not in self._values
        count = self.number("num_key_value_heads", default if left_out and default else heads)
        if heads % count:
            raise ModelError(
                f"{self.file}: num_key_value_heads={count} does not divide num_attention_heads={heads}"
            )
        return count

    def refuse(self, key: str, reason: str, remedy: str) -> NoReturn:
        """Raise a ModelError about a value that FedSpeed cannot train as it is meant."""
        raise ModelError(f"{self.file}: {key}={self._values.get(key)!r}: {reason}; {remedy}")

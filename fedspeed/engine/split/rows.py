"""Hidden states as they travel between the parts of a split model: those of real tokens, without padding."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedspeed.engine.split.messages import Limits
from fedspeed.errors import FedSpeedError

# Types that numpy does not have travel as their bits.
_BITS = {torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Rows:
    """Rows of tokens that are padded on the right.

    Attributes:
        lengths: real tokens of each row. width: to which all are padded.
    """

    lengths: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, attention_mask: np.ndarray) -> "Rows":
        """Return the rows of a batch: [B, T], 1 on tokens and 0 on padding, which is on the right."""
        return cls(tuple(attention_mask.sum(1).tolist()), attention_mask.shape[1])

    @classmethod
    def received(cls, lengths: np.ndarray, most: Limits) -> "Rows":
        """Return rows of received lengths, padded to the longest of them: no more than `most` allows, however
        small the message was.

        Raises:
            FedSpeedError: they are no lengths.
        """
        valid = lengths.dtype == np.int64 and lengths.ndim == 1 and 0 < lengths.size <= most.rows
        if not valid or lengths.min() < 1 or lengths.max() > most.tokens:
            raise FedSpeedError(
                f"a message has impossible lengths of rows ({lengths.dtype} {lengths.shape}); there may be "
                f"up to {most.rows} rows (train.micro_batch times the client's ranks) of 1 to {most.tokens} "
                "tokens (data.max_tokens)"
            )
        return cls(tuple(lengths.tolist()), int(lengths.max()))

    @property
    def tokens(self) -> int:
        """Return the number of real tokens."""
        return sum(self.lengths)

    @property
    def mask(self) -> np.ndarray:
        """Return [B, T] bool, whether there is a real token."""
        return np.arange(self.width) < np.array(self.lengths)[:, None]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Return [n, d] of the real tokens from [B, T, d]."""
        return padded[torch.from_numpy(self.mask).to(padded.device)]

    def unpack(self, real: torch.Tensor) -> torch.Tensor:
        """Return [B, T, d] from [n, d] of the real tokens, with zeros at padding."""
        padded = real.new_zeros((len(self.lengths), self.width, real.shape[-1]))
        padded[torch.from_numpy(self.mask).to(real.device)] = real
        return padded


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return the values of a tensor for a message."""
    host = tensor.detach().cpu().contiguous()
    return host.view(_BITS.get(host.dtype, host.dtype)).numpy()


def from_array(message: Mapping[str, np.ndarray], name: str, like: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return an array of a received message as a tensor [tokens, d], on the device of `like`.

    Args:
        like: a tensor of the same type and width, [..., d]. tokens: that there must be.

    Raises:
        FedSpeedError: the message has no such array.
    """
    array = message.get(name)
    shape = (tokens, like.shape[-1])
    bits = torch.empty(0, dtype=_BITS.get(like.dtype, like.dtype)).numpy().dtype
    if array is None or array.shape != shape or array.dtype != bits:
        found = "no such array" if array is None else f"{array.dtype} {array.shape}"
        raise FedSpeedError(f"a message should have {name} as {bits} {shape}, and has {found}")
    return torch.from_numpy(array.copy()).view(like.dtype).to(like.device)

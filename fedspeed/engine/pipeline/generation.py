"""Generation with pipelines: pieces of tokens go through the stages.

Every rank keeps keys and values of its own blocks. In a client's pipeline all ranks make the same pieces of
the same prompts. In a cluster's pipeline the rank that owns a client sends the others a description of its
pieces without tokens (`engine.generation.piece_messages`), embeds them, and reads their logits.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from deepspeed import comm as dist

from fedspeed.engine.generation.piece_messages import PieceReceiver, PieceSender
from fedspeed.engine.generation.pieces import Piece
from fedspeed.engine.pipeline.pipelined import PipelinedEngine
from fedspeed.engine.pipeline.transfers import naming_lost_ranks
from fedspeed.schedule.instructions import Micro


class ClientGeneration(PipelinedEngine):
    """A client's pipeline that generates. The last stage reads the logits and shares the values."""

    @abstractmethod
    def _micro(self, slot: int) -> Micro:
        """Describe a micro-batch of a client slot."""

    @naming_lost_ranks("while generated tokens were shared")
    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        found = self._play_pieces([self._micro(0)] * len(pieces), pieces)
        flat = _joined(pieces, {m: values.cpu().numpy() for m, values in found.items()})
        shared = torch.from_numpy(flat).to(self._device)
        dist.all_reduce(shared, group=self.groups.client)
        return _split(pieces, shared.cpu().numpy())


class ClusterGeneration(PipelinedEngine):
    """A cluster's pipeline that generates. A pass takes the pieces of all its clients.

    Attributes:
        _owners: by global slot (see `headers`), the rank that has its client's data.
        _own_slots: global slots of this rank's clients, by local slot.
        _is_gateway: whether this rank acts for its client.
    """

    _owners: list[int]
    _own_slots: list[int]
    _is_gateway: bool

    def begin_pieces(self) -> None:
        self._idle_pass(backward=False)  # stages receive the states that were loaded
        self._sent_pieces = PieceSender()
        self._received_pieces: dict[int, PieceReceiver] = {}  # by rank

    def end_pieces(self) -> None:
        del self._sent_pieces, self._received_pieces

    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        own = pieces if self._is_gateway else []
        numbered = sorted(self._everyones_pieces(own), key=lambda entry: entry[0])
        micros = [Micro(slot, self._owners[slot], self._owners[slot]) for (_, slot), _ in numbered]
        found = self._play_pieces(micros, [piece for _, piece in numbered]) if numbered else {}
        if not pieces:
            return []
        values = {numbered[m][0][0]: result.cpu().numpy() for m, result in found.items()}
        return _split(pieces, self.share_from_gateway(_joined(pieces, values)))

    def _everyones_pieces(self, own: Sequence[Piece]) -> list[tuple[tuple[int, int], Piece]]:
        """Return the pieces of all ranks, each with (its number among its rank's pieces, its global slot)."""
        everyones = self._everyones_integers([self._own_slots[0], *self._sent_pieces.integers(own)])
        found = []
        for rank, (slot, *encoded) in enumerate(everyones):
            if rank == self._rank:
                pieces = list(own)
            else:
                pieces = self._received_pieces.setdefault(rank, PieceReceiver()).pieces(encoded)
            found += [((number, slot), piece) for number, piece in enumerate(pieces)]
        return found

    @abstractmethod
    def _everyones_integers(self, own: list[int]) -> list[list[int]]:
        """Return the integers of each rank of the cluster. Collective over the cluster."""


def _joined(pieces: Sequence[Piece], values: Mapping[int, np.ndarray]) -> np.ndarray:
    """Concatenate the values of some pieces, [float64]; unknown values are 0."""
    parts = [values.get(m, np.zeros(piece.count)) for m, piece in enumerate(pieces)]
    return np.concatenate(parts, dtype=np.float64)


def _split(pieces: Sequence[Piece], flat: np.ndarray) -> list[np.ndarray]:
    """Return the values of each piece, in its own type."""
    ends = np.cumsum([piece.count for piece in pieces])[:-1]
    return [
        part.astype(np.int64 if piece.reads_tokens else np.float32)
        for piece, part in zip(pieces, np.split(flat, ends))
    ]

"""Pieces of tokens through the pipelines: what is added to their engines.

Every rank keeps keys and values of its own blocks: in a client's pipeline all ranks make the same pieces of
    the same prompts; in a
cluster's each owner tells the others where its tokens stand (`told`), embeds them, and reads their logits.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from deepspeed import comm as dist

from fedspeed.engine.generation.interface import Generating
from fedspeed.engine.generation.piece_messages import PieceReceiver, PieceSender
from fedspeed.engine.generation.pieces import Piece
from fedspeed.engine.pipeline.transfers import naming_lost_ranks
from fedspeed.schedule.instructions import Micro


class PipelinedGeneration(Generating):
    """Of every pipeline: a pass takes all pieces through it."""

    def piece_passes(self, pieces: Sequence[Piece]) -> int:
        return min(1, len(pieces))

    def _play_pieces(self, micros: Sequence[Micro], pieces: Sequence[Piece]) -> dict[int, torch.Tensor]:
        """Take pieces through the pipeline, each under the state of its micro-batch's client; the values of
        those whose head is here, by number.
        """
        streams = self._streams(tuple(micros), False)
        self.model.eval()
        self._piece_stage.begin(
            pieces, [self._states[micro.client].tensors() for micro in micros], streams[self._me]
        )
        self._execute(streams, self._piece_stage, lambda m: pieces[m].tokens.shape, train=False)
        return self._piece_stage.end()


class ClientGeneration(PipelinedGeneration):
    """Of a client's pipeline, whose last stage tells the others what it has read."""

    @naming_lost_ranks("while generated tokens were told")
    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        found = self._play_pieces([self._micro(0)] * len(pieces), pieces)
        flat = torch.from_numpy(_joined(pieces, {m: values.cpu().numpy() for m, values in found.items()})).to(
            self._device
        )
        dist.all_reduce(flat, group=self.groups.client)
        return _parted(pieces, flat.cpu().numpy())


class ClusterGeneration(PipelinedGeneration):
    """Of a cluster's pipeline, in which a pass takes the pieces of all its clients."""

    def begin_pieces(self) -> None:
        self._idle_pass(backward=False)  # in which states are told
        self._told = PieceSender()
        self._followed = {}

    def end_pieces(self) -> None:
        del self._told, self._followed

    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        numbered = sorted(self._everyones_pieces(pieces if self._speaks else []), key=lambda one: one[0])
        micros = [Micro(place, self._owners[place], self._owners[place]) for (_, place), _ in numbered]
        found = self._play_pieces(micros, [piece for _, piece in numbered]) if numbered else {}
        if not pieces:
            return []
        own = {numbered[m][0][0]: values.cpu().numpy() for m, values in found.items()}
        return _parted(pieces, self.share_from_gateway(_joined(pieces, own)))

    def _everyones_pieces(self, own: Sequence[Piece]) -> list[tuple[tuple[int, int], Piece]]:
        """Give the pieces of all ranks, each under (its number among its rank's, the place of its client)."""
        everyones = self._everyones_integers([self._mine[0], *self._told.integers(own)])
        found = []
        for rank, (place, *told) in enumerate(everyones):
            pieces = (
                own if rank == self._me else self._followed.setdefault(rank, PieceReceiver()).pieces(told)
            )
            found += [((number, place), piece) for number, piece in enumerate(pieces)]
        return found

    @abstractmethod
    def _everyones_integers(self, mine: list[int]) -> list[list[int]]:
        """Give what each rank of the cluster says."""


def _joined(pieces: Sequence[Piece], values: Mapping[int, np.ndarray]) -> np.ndarray:
    """All values of some pieces behind each other, [float64]; 0 where they are not known."""
    parts = [values.get(m, np.zeros(piece.count)) for m, piece in enumerate(pieces)]
    return np.concatenate(parts, dtype=np.float64)


def _parted(pieces: Sequence[Piece], flat: np.ndarray) -> list[np.ndarray]:
    """The values of each piece, in its own type."""
    ends = np.cumsum([piece.count for piece in pieces])[:-1]
    return [
        part.astype(np.int64 if piece.reads_tokens else np.float32)
        for piece, part in zip(pieces, np.split(flat, ends))
    ]

"""Send parts of clients' states between the ranks of a cluster's pipeline. Each stage receives and sends only
the tensors of its own blocks.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import distributed as dist

from fedspeed.engine.pipeline.transfers import Routes, naming_lost_ranks
from fedspeed.schedule.instructions import Kind

Tensors = dict[str, torch.Tensor]


class StageStates:
    """Scatter states from the ranks that own the client slots to the stages, and gather them.

    Args:
        owners: by global slot (see `headers`), the rank that has its client's data.
        stage_names: by rank, the names of the trainable tensors of its stage.
        shapes: of all trainable tensors, by name.
    """

    def __init__(
        self,
        routes: Routes,
        owners: Sequence[int],
        stage_names: Sequence[Sequence[str]],
        *,
        shapes: Mapping[str, torch.Size],
        device: torch.device,
    ):
        self._routes = routes
        self._owners = owners
        self._stage_names = stage_names
        self._shapes = shapes
        self._device = device
        self._rank = dist.get_rank()

    @naming_lost_ranks("while states were sent to stages")
    def scatter(
        self,
        slots: Sequence[int],
        values_of: Callable[[int], Tensors],
        marked_of: Callable[[int], frozenset[str]],
    ) -> dict[int, tuple[Tensors, frozenset[str]]]:
        """Send every stage its part of the tensors of some global slots.

        Args:
            values_of: returns the full fp32 tensors by name of a slot that this rank owns.
            marked_of: returns which of these names are marked (frozen).

        Returns:
            by global slot (values of this stage's tensors, names of the marked ones). A slot that this rank
            owns has all of its tensors.
        """
        sends = []
        receives = []
        found = {}
        names = self._stage_names[self._rank]
        for slot in slots:
            owner = self._owners[slot]
            if owner == self._rank:
                values = values_of(slot)
                marked = marked_of(slot)
                found[slot] = values, marked
                for rank, wanted in enumerate(self._stage_names):
                    if rank != self._rank and wanted:
                        flags = torch.tensor([float(n in marked) for n in wanted])
                        flat = torch.cat([*(values[n].reshape(-1).float() for n in wanted), flags])
                        sends.append(self._send(flat.to(self._device), rank, "activation"))
            else:
                flat, work = self._receive(self._size(names) + len(names), owner, "activation")
                receives.append((slot, flat, work))
        for slot, flat, work in receives:
            work.wait(self._routes.deadline)
            values, flags = self.split(flat.cpu(), names)
            found[slot] = values, frozenset(n for n, flag in zip(names, flags.tolist()) if flag)
        for _, work in sends:
            work.wait(self._routes.deadline)
        return found

    @naming_lost_ranks("while states were collected from stages")
    def gather(self, slots: Sequence[int], values_of: Callable[[int], Tensors]) -> dict[int, Tensors]:
        """Send the owners of some global slots the tensors of all stages.

        Args:
            values_of: returns this stage's full fp32 tensors of a slot, by name.

        Returns:
            all tensors of each slot that this rank owns.
        """
        sends = []
        receives = []
        found = {}
        names = self._stage_names[self._rank]
        for slot in slots:
            owner = self._owners[slot]
            values = values_of(slot)
            if owner == self._rank:
                found[slot] = dict(values)
                for rank, others in enumerate(self._stage_names):
                    if rank != self._rank and others:
                        flat, work = self._receive(self._size(others), rank, "gradient")
                        receives.append((slot, others, flat, work))
            elif names:
                flat = torch.cat([values[n].reshape(-1) for n in names]).to(self._device)
                sends.append(self._send(flat, owner, "gradient"))
        for slot, others, flat, work in receives:
            work.wait(self._routes.deadline)
            found[slot] |= self.split(flat.cpu(), others)[0]
        for _, work in sends:
            work.wait(self._routes.deadline)
        return found

    def _send(self, flat: torch.Tensor, to: int, kind: Kind) -> tuple[torch.Tensor, dist.Work]:
        """Start to send; returns the tensor, which must stay alive, and the handle."""
        work = dist.isend(flat, to, group=self._routes.group(kind, self._rank, to))
        assert work is not None, "both ranks are members of the group"
        return flat, work

    def _receive(self, size: int, source: int, kind: Kind) -> tuple[torch.Tensor, dist.Work]:
        """Start to receive [size]; returns the tensor and the handle."""
        flat = torch.empty(size, device=self._device)
        work = dist.irecv(flat, source, group=self._routes.group(kind, source, self._rank))
        assert work is not None, "both ranks are members of the group"
        return flat, work

    def _size(self, names: Sequence[str]) -> int:
        return sum(self._shapes[n].numel() for n in names)

    def split(self, flat: torch.Tensor, names: Sequence[str]) -> tuple[Tensors, torch.Tensor]:
        """Split a flat tensor into ({name: tensor} of its first values, the rest)."""
        sizes = [self._shapes[n].numel() for n in names]
        *parts, rest = flat.split([*sizes, len(flat) - sum(sizes)])
        return {n: part.view(self._shapes[n]).clone() for n, part in zip(names, parts)}, rest

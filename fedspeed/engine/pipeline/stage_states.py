"""Parts of clients' states between the ranks of a cluster's pipeline: each stage gets and gives its own part
only.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import distributed as dist

from fedspeed.engine.pipeline.transfers import Routes, naming_lost_ranks

Tensors = dict[str, torch.Tensor]


class StageStates:
    """Args:
    owners: of all client slots of the cluster, the rank whose data it is.
    held: by rank, the names of the trainable tensors of its stage.
    shapes: of all trainable tensors, by name.
    """

    def __init__(
        self,
        routes: Routes,
        owners: Sequence[int],
        held: Sequence[Sequence[str]],
        *,
        shapes: Mapping[str, torch.Size],
        device: torch.device,
    ):
        self._routes = routes
        self._owners = owners
        self._held = held
        self._shapes = shapes
        self._device, self._me = device, dist.get_rank()

    @naming_lost_ranks("while stages were told states")
    def scatter(
        self, places: Sequence[int], own: Callable[[int], Tensors], marked: Callable[[int], frozenset[str]]
    ) -> dict[int, tuple[Tensors, frozenset[str]]]:
        """Give every stage its part of what owners have of some client slots.

        Args:
            own: an own place's full fp32 tensors by name. marked: names of them that carry a mark (are
                frozen).

        Returns:
            by place (values of this stage's tensors, which of them are marked); an own place has all of its
            tensors.
        """
        sends = []
        receives = []
        found = {}
        mine = self._held[self._me]
        for place in places:
            owner = self._owners[place]
            if owner == self._me:
                values = own(place)
                marks = marked(place)
                found[place] = values, marks
                for rank, names in enumerate(self._held):
                    if rank != self._me and names:
                        flags = torch.tensor([float(n in marks) for n in names])
                        flat = torch.cat([*(values[n].reshape(-1).float() for n in names), flags]).to(
                            self._device
                        )
                        sends.append((
                            flat,
                            dist.isend(flat, rank, group=self._routes.group("activation", self._me, rank)),
                        ))
            else:
                flat = torch.empty(
                    sum(self._shapes[n].numel() for n in mine) + len(mine), device=self._device
                )
                group = self._routes.group("activation", owner, self._me)
                receives.append((place, flat, dist.irecv(flat, owner, group=group)))
        for place, flat, work in receives:
            work.wait(self._routes.deadline)
            values, flags = self.parted(flat.cpu(), mine)
            found[place] = values, frozenset(n for n, flag in zip(mine, flags.tolist()) if flag)
        for _, work in sends:
            work.wait(self._routes.deadline)
        return found

    @naming_lost_ranks("while stages told their states")
    def gather(self, places: Sequence[int], own: Callable[[int], Tensors]) -> dict[int, Tensors]:
        """Give owners the whole of what all stages have of their client slots: by own place.

        Args:
            own: this stage's full fp32 tensors of a place, by name.
        """
        sends = []
        receives = []
        found = {}
        for place in places:
            owner = self._owners[place]
            names = self._held[self._me]
            values = own(place)
            if owner == self._me:
                found[place] = dict(values)
                for rank, theirs in enumerate(self._held):
                    if rank != self._me and theirs:
                        flat = torch.empty(sum(self._shapes[n].numel() for n in theirs), device=self._device)
                        group = self._routes.group("gradient", rank, self._me)
                        receives.append((place, theirs, flat, dist.irecv(flat, rank, group=group)))
            elif names:
                flat = torch.cat([values[n].reshape(-1) for n in names]).to(self._device)
                sends.append((
                    flat,
                    dist.isend(flat, owner, group=self._routes.group("gradient", self._me, owner)),
                ))
        for place, names, flat, work in receives:
            work.wait(self._routes.deadline)
            found[place] |= self.parted(flat.cpu(), names)[0]
        for _, work in sends:
            work.wait(self._routes.deadline)
        return found

    def parted(self, flat: torch.Tensor, names: Sequence[str]) -> tuple[Tensors, torch.Tensor]:
        """({name: tensor} of what lies first in `flat`, the rest)."""
        sizes = [self._shapes[n].numel() for n in names]
        *parts, rest = flat.split([*sizes, len(flat) - sum(sizes)])
        return {n: part.view(self._shapes[n]).clone() for n, part in zip(names, parts)}, rest

"""Fill the store while the model's weights are read, one unit at a time."""

from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import torch
from deepspeed import comm as dist
from torch import nn

from fedspeed.config.deepspeed_rules import at
from fedspeed.engine.base.gathered import GatheredTier
from fedspeed.engine.base.layout import StoredTensor, Unit, frozen_units
from fedspeed.engine.base.node import NvmeTier, OneSidedTier, RamTier
from fedspeed.engine.base.placement import BaseSizes, offloaded, resident_count, slots_of
from fedspeed.engine.base.quantised import QuantisedTier
from fedspeed.engine.base.store import EMPTY, BaseStore
from fedspeed.engine.base.tier import ResidentTier, Tier
from fedspeed.engine.clock import Clock
from fedspeed.engine.config import EngineConfig
from fedspeed.engine.groups import Groups, base_group, world_deadline
from fedspeed.errors import FedSpeedError
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.limits import QUANTISED
from fedspeed.schedule.loads import spread


class StoreBuilder:
    """Put the frozen parameters of a model into tiers.

    Call `place` for each parameter, in the order of `models.loading.materialise`, then `seal`.

    Args:
        parts: of the model.
        tier: where streamed units are stored.
        nvme: folder of this rank for offloaded tensors.
        only: the parameters that this rank needs; None: all.

    Raises:
        FedSpeedError: the tier has no room for the base.
    """

    def __init__(
        self,
        net: nn.Module,
        parts: Anatomy,
        tier: str,
        engine: EngineConfig,
        *,
        groups: Groups,
        ds_config: dict,
        nvme: Path,
        only: Container[nn.Parameter] | None = None,
    ):
        self._net = net
        self._groups = groups
        self._units = frozen_units(net, only)
        self._place_of = {p.name: (i, p) for i, unit in enumerate(self._units) for p in unit.tensors}
        self._blocks = _units_of(self._place_of, net, parts.blocks)
        outer = _units_of(self._place_of, net, [parts.embedding, parts.head])
        sizes = self._sizes(outer, tier, engine, groups, ds_config)
        self._slots = 0 if tier == "resident" else slots_of(engine, sizes)
        resident = {sorted(self._blocks)[i] for i in spread(sizes.blocks, resident_count(engine, sizes))}
        if tier == "resident":
            resident = self._blocks | outer
        elif tier in QUANTISED:
            resident |= outer  # they are small compared with the blocks, and lose most by quantisation
        # The other units outside the blocks (norms) are small, and always resident.
        streamed = [i for i in sorted(self._blocks | outer) if i not in resident]
        self._tier_of: list[Tier] = [ResidentTier()] * len(self._units)
        if streamed:
            units = {i: self._units[i] for i in streamed}
            streaming = _make_tier(tier, units, engine, groups=groups, ds_config=ds_config, nvme=nvme)
            for i in streamed:
                self._tier_of[i] = streaming
        self._current: tuple[int, torch.Tensor] | None = None  # the unit that is being read, and its bytes

    def _sizes(
        self, outer: set[int], tier: str, engine: EngineConfig, groups: Groups, ds_config: dict
    ) -> BaseSizes:
        """Return the sizes of the units.

        Args:
            outer: units of embedding and head.
        """
        nbytes = [unit.nbytes for unit in self._units]
        on_devices = (
            tier in ("client", "cluster") and engine.base_reads == "gather" and not offloaded(ds_config)
        )
        return BaseSizes(
            max((nbytes[i] for i in self._blocks), default=0),
            len(self._blocks),
            sum(nbytes[i] for i in outer),
            shared_slot=max((nbytes[i] for i in outer), default=0),
            resident=sum(n for i, n in enumerate(nbytes) if i not in self._blocks | outer),
            holders=dist.get_world_size(base_group(tier, groups)) if on_devices else 0,
        )

    def place(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """Copy a frozen parameter into its unit, and release its memory; others are returned unchanged."""
        if name not in self._place_of:
            return parameter
        index, tensor = self._place_of[name]
        if self._current is None or self._current[0] != index:
            self._flush()
            self._current = index, torch.zeros(self._units[index].nbytes, dtype=torch.uint8)
        self._units[index].view(self._current[1], tensor).copy_(parameter.data)
        parameter.data = EMPTY.to(parameter.dtype)
        return parameter

    def _flush(self) -> None:
        """Put the current unit into its tier."""
        if self._current is not None:
            self._tier_of[self._current[0]].put(*self._current)

    def seal(self, clock: Clock) -> BaseStore:
        """Return the filled store. Collective over the cluster."""
        self._flush()
        store = BaseStore(
            self._units,
            self._tier_of,
            dict(self._net.named_parameters()),
            block_units=self._blocks,
            slots=self._slots,
            clock=clock,
        )
        store.seal()
        return store


def _units_of(
    place_of: Mapping[str, tuple[int, StoredTensor]], net: nn.Module, modules: Iterable[nn.Module]
) -> set[int]:
    """Return the numbers of the units with the frozen parameters of some modules.

    Args:
        place_of: by name of a parameter, the number of its unit and where it lies there.
    """
    names = {id(p): n for n, p in net.named_parameters()}
    return {
        place_of[names[id(p)]][0]
        for module in modules
        for p in module.parameters()
        if names[id(p)] in place_of
    }


def _make_tier(
    tier: str, units: dict[int, Unit], engine: EngineConfig, groups: Groups, ds_config: dict, *, nvme: Path
) -> Tier:
    """Make a tier that streams the given units. Collective over the ranks that share it."""
    if tier in QUANTISED:
        return QuantisedTier(units, tier)
    if tier == "ram":
        return RamTier(units, groups.cluster)
    if tier == "nvme":
        path = at(ds_config, "zero_optimization.offload_param.nvme_path") or "auto"
        return NvmeTier(units, nvme if path == "auto" else Path(path), groups.cluster)
    if tier in ("client", "cluster") and engine.base_reads == "one_sided":
        return OneSidedTier(units, base_group(tier, groups), tier, world_deadline().total_seconds())
    if tier in ("client", "cluster"):
        return GatheredTier(units, base_group(tier, groups), tier, offloaded(ds_config))
    raise FedSpeedError(f"engine.tier={tier}: not a tier that streams")

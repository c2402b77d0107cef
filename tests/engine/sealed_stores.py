"""A base store of small units, and a pass over it whose sum is right only if every unit had its values."""

from tests.tiny import NoClock

BLOCKS = 6
WIDTH = 40


def tier_of(kind, units, folder):
    import torch

    from fedspeed.engine.base import gathered, node

    group = torch.distributed.group.WORLD
    if kind == "ram":
        return node.RamTier(units, group)
    if kind == "nvme":
        return node.NvmeTier(units, folder, group)
    return gathered.GatheredTier(units, group, "cluster", offload=kind == "slices in host memory")


def sealed_store(kind, slots, folder):
    """Return (a sealed store of blocks and one other unit, its parameters, their values)."""
    import torch

    from fedspeed.engine.base.layout import pack
    from fedspeed.engine.base.store import BaseStore

    names = [f"{i}.weight" for i in range(BLOCKS + 1)]
    units = [
        pack(str(i), [(name, torch.Size([WIDTH, WIDTH]))], torch.float32) for i, name in enumerate(names)
    ]
    parameters = {name: torch.nn.Parameter(torch.empty(0), requires_grad=False) for name in names}
    values = [torch.full((WIDTH, WIDTH), float(i + 1)) for i in range(len(units))]
    tier = tier_of(kind, dict(enumerate(units)), folder)
    for i, unit in enumerate(units):
        data = torch.zeros(unit.nbytes, dtype=torch.uint8)
        unit.view(data, unit.tensors[0]).copy_(values[i])
        tier.put(i, data)
    store = BaseStore(
        units, [tier] * len(units), parameters, block_units=set(range(BLOCKS)), slots=slots, clock=NoClock()
    )
    store.seal()
    return store, [parameters[name] for name in names]


ORDER = [*range(BLOCKS), BLOCKS, *range(BLOCKS - 2, -1, -1)]
RIGHT = sum((place + 1) * (unit + 1) for place, unit in enumerate(ORDER))


def a_pass(store, parameters) -> float:
    """Return the sum over a pass of the mean of each unit, weighted by its position in the pass."""
    import torch

    store.begin(ORDER + ORDER[:3])
    total = torch.zeros(())
    for place, unit in enumerate(ORDER):
        with store.use(unit):
            total += (parameters[unit] * (place + 1)).mean()
    return total

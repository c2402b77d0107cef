"""What operations of torch read and write."""

from functools import cache

import torch

NO_READ = frozenset({
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty_strided",
    "is_same_size",
    "size",
    "stride",
})


@cache
def _ways(func) -> tuple[str, ...]:
    """For each argument of an operation: "write", "read", or "" where its memory is not touched."""
    schema = func._schema
    given = set()
    for value in schema.returns:
        if value.alias_info is not None and not value.alias_info.is_write:
            given |= set(value.alias_info.before_set)
    ways = []
    for argument in schema.arguments:
        alias = argument.alias_info
        if alias is not None and alias.is_write or schema.name.startswith("c10d::"):
            ways.append("write")
        elif (
            alias is not None and given & set(alias.before_set) or schema.name.rpartition("::")[2] in NO_READ
        ):
            ways.append("")
        else:
            ways.append("read")
    return tuple(ways)


def uses_of(func, args, kwargs):
    """(tensor, whether it is written) of an operation's arguments."""
    ways = _ways(func)
    for way, value in zip(ways, args):
        if way:
            for tensor in tensors_in(value):
                yield tensor, way == "write"
    if kwargs:
        names = {argument.name: way for argument, way in zip(func._schema.arguments, ways)}
        for name, value in kwargs.items():
            if names[name]:
                for tensor in tensors_in(value):
                    yield tensor, names[name] == "write"


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and value.layout is torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(first byte, byte behind the last) in its storage."""
    size = tensor.element_size()
    start = tensor.storage_offset()
    if tensor.numel() == 0:
        return 0, 0
    last = start + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride()))
    return start * size, (last + 1) * size

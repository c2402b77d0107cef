"""Which blocks stay on the device where only some can. Pure."""


def spread(blocks: int, count: int) -> list[int]:
    """Choose `count` of `blocks` blocks at even distances: each gives the load of the next streamed one the
    time of its own arithmetic."""
    return [i * blocks // count for i in range(count)]

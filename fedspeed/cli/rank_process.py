"""What the commands that compute on ranks have in common."""

import os
from collections.abc import Mapping
from typing import TextIO


def prepare_rank(env: Mapping[str, str] | None, *, as_json: bool) -> TextIO | None:
    """Prepare this process to be a rank, before torch is imported.

    Args:
        env: changes to the environment, if the process was forked rather than started.
        as_json: whether it takes over stdout for JSON lines.

    Returns:
        where JSON lines are written; None without them.
    """
    os.environ.update(env or {})
    from fedspeed.cluster.devices import choose_accelerator, choose_allocator
    from fedspeed.monitor.stdout import claim_stdout

    choose_accelerator(os.environ)
    choose_allocator(os.environ)
    return claim_stdout() if as_json else None  # before anything keeps a reference to stdout

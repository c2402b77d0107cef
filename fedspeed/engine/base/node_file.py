"""Memory and disk space that the ranks of one node share. It is freed when the last of them ends, however
they end.
"""

import json
import mmap
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import ProcessGroup

from fedspeed.cluster.devices import free_memory
from fedspeed.errors import FedSpeedError

RESERVE_BYTES = 1 << 30  # RAM is reserved in steps of this size


class NodeFile:
    """A file without a name, written by the first rank of the node and read by all of them.

    The others open it through /proc of the first rank, so nothing is left behind even after `kill -9`.

    Args:
        nbytes: its size. All of it is reserved at once, so that a lack of space is noticed here and not
            later.
        folder: where on disk; None for RAM.

    Raises:
        FedSpeedError: there is not enough room (raised on all ranks of the group), or the first rank's file
            cannot be opened.

    Attributes:
        writes: whether this rank is the first of its node.
        fd: file descriptor.
    """

    def __init__(self, nbytes: int, folder: Path | None, group: ProcessGroup):
        self._group = group
        self.nbytes = nbytes
        rank = dist.get_rank()
        self.node = next(node for node in nodes_of(group) if rank in node)
        self.writes = rank == self.node[0]
        self.fd = -1
        problem = ""
        if self.writes:
            try:
                self.fd = _anonymous(nbytes, folder)
            except FedSpeedError as error:
                problem = str(error)
        records = share({"rank": rank, "pid": os.getpid(), "fd": self.fd, "problem": problem}, group)
        first = next(record for record in records if record["rank"] == self.node[0])
        problems = [record["problem"] for record in records if record["problem"]]
        if problems:
            if self.fd >= 0:
                os.close(self.fd)
            raise FedSpeedError(problems[0])
        if not self.writes:
            try:
                self.fd = os.open(f"/proc/{first['pid']}/fd/{first['fd']}", os.O_RDWR)
            except OSError as error:
                raise FedSpeedError(
                    f"{socket.gethostname()}: the memory of rank {self.node[0]} cannot be opened "
                    f"({error.strerror}); start the ranks of a machine in one container and as one user, or "
                    "set engine.tier=cluster"
                ) from error

    def write(self, at: int, data: torch.Tensor) -> None:
        """Write bytes [n] uint8 (CPU) at offset `at`; does nothing on ranks that only read."""
        if self.writes:
            view = data.numpy().data
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], at + done)

    def map(self) -> torch.Tensor:
        """Map the whole content as [nbytes] uint8, to be read only. The mapping itself is writable, since
        CUDA page-locks no other memory.
        """
        return torch.frombuffer(mmap.mmap(self.fd, self.nbytes, mmap.MAP_SHARED), dtype=torch.uint8)

    def settle(self) -> None:
        """Wait until the first rank has written everything. Collective over the group."""
        dist.barrier(group=self._group)

    def close(self) -> None:
        """Close this rank's descriptor."""
        os.close(self.fd)


def nodes_of(group: ProcessGroup) -> list[list[int]]:
    """Group the ranks by the machine they run on, in the same order on all ranks. Collective over the
    group.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    nodes: dict[tuple[str, ...], list[int]] = {}
    for rank, *machine in share([dist.get_rank(), socket.gethostname(), boot], group):
        nodes.setdefault(tuple(machine), []).append(rank)
    return sorted(sorted(ranks) for ranks in nodes.values())


def share(value: Any, group: ProcessGroup) -> list[Any]:
    """Return the value of each rank of the group, in their order. Collective over the group.

    Args:
        value: of types that JSON has.
    """
    device = get_accelerator().current_device_name()
    ranks = dist.get_world_size(group)
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = torch.zeros(ranks, dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(lengths, torch.tensor([len(text)], device=device), group=group)
    longest = int(lengths.max())
    texts = torch.zeros(ranks * longest, dtype=torch.uint8, device=device)
    padded = torch.nn.functional.pad(text, (0, longest - len(text)))
    torch.distributed.all_gather_into_tensor(texts, padded, group=group)
    rows = zip(texts.view(ranks, longest), lengths.tolist())
    return [json.loads(bytes(row[:length].tolist())) for row, length in rows]


def reserve(
    nbytes: int, free: Callable[[], int], take: Callable[[int, int], None], piece: int = RESERVE_BYTES
) -> None:
    """Reserve memory in steps, and check before each of them how much is free: on some machines memory grows
    while it is used.

    Args:
        nbytes: how much in all.
        free: returns the bytes that are available now.
        take: reserves a number of bytes (second argument) at an offset (first argument).
        piece: bytes of a step.

    Raises:
        FedSpeedError: there is no room for the next step; the caller releases what was reserved.
    """
    for at in range(0, nbytes, piece):
        wanted = min(piece, nbytes - at)
        if (left := free()) < wanted:
            raise FedSpeedError(
                f"{socket.gethostname()}: the base takes {nbytes / 2**30:.2f} GiB of RAM and "
                f"{(at + left) / 2**30:.2f} GiB "
                "are free; free some, or set engine.tier=nvme or engine.tier=cluster"
            )
        take(at, wanted)


def _anonymous(nbytes: int, folder: Path | None) -> int:
    """Return a descriptor of a nameless file with `nbytes` reserved bytes."""
    fd = os.memfd_create("fedspeed-base") if folder is None else _unlinked(folder)
    try:
        if folder is None:
            reserve(max(1, nbytes), free_memory, lambda at, size: os.posix_fallocate(fd, at, size))
        else:
            os.posix_fallocate(fd, 0, max(1, nbytes))
    except OSError as error:
        os.close(fd)
        raise FedSpeedError(
            f"{socket.gethostname()}: the base takes {nbytes / 2**30:.2f} GiB in "
            f"{folder or 'RAM'}, which does not have them "
            f"({error.strerror}); make room, or choose another engine.tier"
        ) from error
    except FedSpeedError:
        os.close(fd)
        raise
    return fd


def _unlinked(folder: Path) -> int:
    """Return a descriptor of a new file in a folder, whose name is already removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=folder, prefix="base-")
        os.unlink(name)
    except OSError as error:
        raise FedSpeedError(
            f"{folder}: cannot be written ({error.strerror}); name a folder on a local disk "
            f"with nvme= in the hostfile"
        ) from error
    return fd

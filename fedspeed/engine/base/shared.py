"""Memory and disk space that the ranks of one node share, and that vanishes with the last of them, however
they end.
"""

import json
import mmap
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed.cluster.devices import free_memory
from fedspeed.errors import FedSpeedError

PIECE = 1 << 30  # bytes of RAM that are reserved at once


class NodeFile:
    """A file without a name, written by the first rank of the node and read by all of them.

    The others open it through /proc of the first, so nothing is left behind even by `kill -9`.

    Args:
        nbytes: its size; all of it is reserved at once, so that a lack of space is met here and not in the
            middle.
        folder: where on disk; None for main memory.

    Raises:
        FedSpeedError: there is not enough room (raised on all ranks of the node), or the first rank's memory
            cannot be opened.
    """

    def __init__(self, nbytes: int, folder: Path | None, group):
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
        words = share({"rank": rank, "pid": os.getpid(), "fd": self.fd, "problem": problem}, group)
        first = next(w for w in words if w["rank"] == self.node[0])
        problems = [w["problem"] for w in words if w["problem"]]
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
                    f"({error.strerror}); start the ranks of a "
                    "machine in one container and as one user, or set engine.tier=cluster"
                ) from error

    def write(self, at: int, data: torch.Tensor) -> None:
        """Put bytes [n] uint8 (CPU) at offset `at`; nothing on a rank that only reads."""
        if self.writes:
            view = memoryview(data.numpy())
            done = 0
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], at + done)

    def map(self) -> torch.Tensor:
        """The whole content [nbytes] uint8, without a copy. To be read only; that it could be written is for
        the driver, which page-locks no other memory.
        """
        return torch.frombuffer(mmap.mmap(self.fd, self.nbytes, mmap.MAP_SHARED), dtype=torch.uint8)

    def settle(self) -> None:
        """Wait until the first rank has written everything."""
        dist.barrier(group=self._group)

    def close(self) -> None:
        os.close(self.fd)


def nodes_of(group) -> list[list[int]]:
    """The group's ranks by the machine they run on; in the same order everywhere. Collective over the
    group.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    nodes: dict[tuple, list[int]] = {}
    for word in share([dist.get_rank(), socket.gethostname(), boot], group):
        nodes.setdefault(tuple(word[1:]), []).append(word[0])
    return sorted(sorted(ranks) for ranks in nodes.values())


def share(value, group) -> list:
    """Everyone's value (of JSON's types), in the order of ranks. Collective over the group."""
    device = get_accelerator().current_device_name()
    ranks = dist.get_world_size(group)
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = torch.zeros(ranks, dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(lengths, torch.tensor([len(mine)], device=device), group=group)
    longest = int(lengths.max())
    texts = torch.zeros(ranks * longest, dtype=torch.uint8, device=device)
    torch.distributed.all_gather_into_tensor(
        texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=group
    )
    return [
        json.loads(bytes(text[:n].tolist())) for text, n in zip(texts.view(ranks, longest), lengths.tolist())
    ]


def reserve(
    nbytes: int, free: Callable[[], int], take: Callable[[int, int], None], piece: int = PIECE
) -> None:
    """Take memory piece by piece, and ask anew what is free before each of them: there are machines whose
    memory grows as it is used.

    Args:
        nbytes: how much in all.
        free: tells the bytes that can be had now.
        take: takes so many bytes at an offset.

    Raises:
        FedSpeedError: the next piece is not there; the caller gives back what was taken.
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
    """A descriptor of `nbytes` reserved bytes."""
    fd = os.memfd_create("fedspeed-base") if folder is None else _nameless(folder)
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


def _nameless(folder: Path) -> int:
    """A descriptor of a new file in a folder that no name leads to."""
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

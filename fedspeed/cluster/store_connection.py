"""Opening the job's key-value store on rank 0, and connecting to it from the other ranks.

A launcher tells all ranks one port before anything starts. Local ranks read the port from a file instead:
rank 0 listens on a port that the kernel has free at that moment, and writes its number there. So no other
program can take the port between its choice and its use.
"""

import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.launch_context import host_of_rank
from fedspeed.errors import HostfileError, LostPeerError
from fedspeed.net.ports import STORE_PORT_OFFSET, free_port

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# A host name that cannot be resolved within this time is taken for wrong.
_RESOLVE_S = 10.0
_PAUSE_S = 0.05


def open_server(port: int, timeout_s: float) -> "TCPStore":
    """Return a torch TCPStore that listens on `port` of all interfaces; 0: on a free one, its attribute
    `port`.

    Another store that this process opens on the same port shares the server if it is `multi_tenant` too, as
    torch's own store of a process group is.

    Raises:
        RuntimeError: the port is taken.
    """
    from torch.distributed import TCPStore

    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=timeout_s),
    )


def open_or_connect(launch: Launch, timeout_s: float) -> tuple["TCPStore", tuple[str, int]]:
    """Open the job's store on world rank 0, or connect to it; return it with its (host, port).

    Raises:
        LostPeerError: the port is taken, rank 0 did not open it in time, or another program answers there.
        HostfileError: the host name of rank 0 cannot be resolved.
    """
    if launch.world_rank == 0:
        tcp = _open(launch, timeout_s)
        # Its own process connects by the loopback interface, whatever the others call this machine.
        return tcp, ("127.0.0.1", tcp.port)
    deadline = time.monotonic() + timeout_s
    address = (launch.master_addr, _port_of(launch, deadline, timeout_s))
    _wait_for_listener(launch, address, deadline=deadline, timeout_s=timeout_s)
    return _connect(launch, address, deadline), address


def ranks_text(launch: Launch, ranks: list[int]) -> str:
    """Return ranks with host and slot as messages name them: `rank 2 (host beta, slot 0)`."""
    located = ((rank, *host_of_rank(launch.hosts, rank)) for rank in ranks)
    return ", ".join(f"rank {rank} (host {host.name}, slot {slot})" for rank, host, slot in located)


def write_port(path: Path, port: int) -> None:
    """Write a port to a file, atomically."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(str(port))
    draft.replace(path)


def read_port(path: Path, deadline: float) -> int | None:
    """Wait for the file of `write_port` and return its port; None at `deadline` (monotonic seconds)."""
    while True:
        try:
            return int(path.read_text())
        except FileNotFoundError:
            if time.monotonic() >= deadline:
                return None
        time.sleep(_PAUSE_S)


def _open(launch: Launch, timeout_s: float) -> "TCPStore":
    if launch.port_file is not None:
        tcp = open_server(0, timeout_s)
        write_port(launch.port_file, tcp.port)
        return tcp
    port = launch.master_port + STORE_PORT_OFFSET
    try:
        return open_server(port, timeout_s)
    except RuntimeError as error:
        raise LostPeerError(
            f"rank 0 cannot open the meeting port {port} on {socket.gethostname()}: {_first_line(error)}; "
            f"end the program that holds it, or choose another with MASTER_PORT={free_port()} (deepspeed "
            "--master_port)"
        ) from None


def _port_of(launch: Launch, deadline: float, timeout_s: float) -> int:
    if launch.port_file is None:
        return launch.master_port + STORE_PORT_OFFSET
    port = read_port(launch.port_file, deadline)
    if port is None:
        raise LostPeerError(
            f"{ranks_text(launch, [0])} did not open a meeting port within {timeout_s:g} s; look at its "
            "output, or raise cluster.start_timeout_s"
        )
    return port


def _connect(launch: Launch, address: tuple[str, int], deadline: float) -> "TCPStore":
    from torch.distributed import TCPStore

    host, port = address
    try:
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=left)
    except RuntimeError as error:
        raise LostPeerError(
            f"rank {launch.world_rank} reached {host}:{port}, but no FedSpeed job answered there: "
            f"{_first_line(error)}; choose another port with MASTER_PORT=..."
        ) from None


def _wait_for_listener(
    launch: Launch, address: tuple[str, int], *, deadline: float, timeout_s: float
) -> None:
    """Wait until rank 0 listens, with a plain socket: a TCPStore prints a trace per refused connection."""
    started = time.monotonic()
    while True:
        try:
            socket.create_connection(address, timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
            return
        except socket.gaierror as error:
            if time.monotonic() - started > min(_RESOLVE_S, timeout_s):
                raise HostfileError(
                    f"rank {launch.world_rank} on {socket.gethostname()} cannot resolve the host of rank 0, "
                    f"`{address[0]}` ({error.strerror}); correct the name, or set MASTER_ADDR to an address"
                ) from None
        except OSError as error:
            if time.monotonic() >= deadline:
                raise LostPeerError(
                    f"{ranks_text(launch, [0])} did not open {address[0]}:{address[1]} within {timeout_s:g} "
                    f"s ({error.strerror or error}); look at its output, check that the port is not "
                    "filtered, or raise cluster.start_timeout_s"
                ) from None
        time.sleep(_PAUSE_S)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

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
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.launch_context import host_of_rank
from fedspeed.errors import HostfileError, LostPeerError
from fedspeed.net.interfaces import (
    LOOPBACK,
    address_facing,
    addresses_here,
    is_ip_address,
    is_loopback,
    listening_socket,
)
from fedspeed.net.ports import STORE_PORT_OFFSET, free_port

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# A host name that cannot be resolved within this time is taken for wrong.
_RESOLVE_S = 10.0
_PAUSE_S = 0.05
# A name service that does not answer costs seconds for each of these.
_HOSTS_TRIED = 3


def open_server(address: str, port: int, timeout_s: float) -> "TCPStore":
    """Return a torch TCPStore that listens on `port` of one IP address of this machine; 0: on a free one, its
    attribute `port`.

    Left to itself a TCPStore listens on all interfaces. Another store that this process opens on the same
    port shares the server if it is `multi_tenant` too, as torch's own store of a process group is.

    Raises:
        OSError: the port is taken.
    """
    from torch.distributed import TCPStore

    listener = listening_socket(address, port)
    port = listener.getsockname()[1]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def open_or_connect(launch: Launch, timeout_s: float) -> tuple["TCPStore", tuple[str, int]]:
    """Open the job's store on world rank 0, or connect to it; return it with its (host, port).

    Raises:
        LostPeerError: the port is taken, rank 0 did not open it in time, or another program answers there.
        HostfileError: the host name of rank 0 cannot be resolved.
    """
    deadline = time.monotonic() + timeout_s
    host = _address_in_time(launch, min(_RESOLVE_S, timeout_s))
    if launch.world_rank == 0:
        tcp = _open(launch, host, timeout_s)
        return tcp, (host, tcp.port)
    port = _port_of(launch, deadline, timeout_s)
    _wait_for_listener(launch, (host, port), deadline=deadline, timeout_s=timeout_s)
    return _connect(launch, (host, port), deadline), (host, port)


def store_address(launch: Launch) -> str:
    """Return the address at which rank 0 listens, as a rank must write it to connect.

    Loopback where one machine runs all ranks. Otherwise rank 0 listens at the address that MASTER_ADDR, or
    the name of the first host, has on the first host. Where that is only loopback (some systems resolve their
    own name so), it listens at the interface that faces the next hosts.

    Ranks of the first host must use the same address, those of other hosts resolve the name themselves. A
    name is returned on the first host too if it cannot be resolved.
    """
    if launch.one_machine:
        return LOOPBACK
    if not _is_on_first_host(launch):
        return launch.master_addr
    if is_loopback(launch.master_addr):
        return launch.master_addr  # hosts that one machine emulates
    named = addresses_here(launch.master_addr)
    facing = filter(None, map(_facing, launch.hosts[1 : 1 + _HOSTS_TRIED]))
    outside = (address for address in (*named, *facing) if not is_loopback(address))
    return next(outside, None) or next(iter(named), launch.master_addr)


def _address_in_time(launch: Launch, limit_s: float) -> str:
    """Return `store_address`. The name service may learn the name of the first host only after its start.

    Raises:
        HostfileError: the name cannot be resolved on that host within the limit.
    """
    deadline = time.monotonic() + limit_s
    while True:
        address = store_address(launch)
        if is_ip_address(address) or not _is_on_first_host(launch):
            return address
        if time.monotonic() >= deadline:
            raise _unknown_host(launch, "no address of this machine")
        time.sleep(_PAUSE_S)


def _is_on_first_host(launch: Launch) -> bool:
    return host_of_rank(launch.hosts, launch.world_rank)[0] == launch.hosts[0]


def _facing(host: Host) -> str | None:
    try:
        return address_facing(host.name)
    except OSError:
        return None


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


def _open(launch: Launch, address: str, timeout_s: float) -> "TCPStore":
    if launch.port_file is not None:
        tcp = open_server(address, 0, timeout_s)
        write_port(launch.port_file, tcp.port)
        return tcp
    port = launch.master_port + STORE_PORT_OFFSET
    try:
        return open_server(address, port, timeout_s)
    except OSError as error:
        raise LostPeerError(
            f"rank 0 cannot open the meeting port {port} of {address} on {socket.gethostname()}: "
            f"{error.strerror or error}; "
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
                raise _unknown_host(launch, error.strerror or str(error)) from None
        except OSError as error:
            if time.monotonic() >= deadline:
                raise LostPeerError(
                    f"{ranks_text(launch, [0])} did not open {address[0]}:{address[1]} within {timeout_s:g} "
                    f"s ({error.strerror or error}); look at its output, check that the port is not "
                    "filtered, or raise cluster.start_timeout_s"
                ) from None
        time.sleep(_PAUSE_S)


def _unknown_host(launch: Launch, reason: str) -> HostfileError:
    return HostfileError(
        f"rank {launch.world_rank} on {socket.gethostname()} cannot resolve the host of rank 0, "
        f"`{launch.master_addr}` ({reason}); correct the name, or set MASTER_ADDR to an address"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

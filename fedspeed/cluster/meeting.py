"""Where the ranks of a job meet: opening the store that rank 0 holds, and finding it.

A launcher tells all ranks one port before anything starts. Local ranks are told a file instead: rank 0 opens
a port that the kernel has free at that moment, and writes its number there. So no other program can take the
port between its choice and its use.
"""

import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.layout import host_of_rank
from fedspeed.errors import HostfileError, LostPeerError
from fedspeed.net.ports import STORE_PORT_OFFSET, free_port

# A host name that cannot be resolved for so long will not appear by itself.
_RESOLVE_S = 10.0
_PAUSE_S = 0.05


def open_server(port: int, timeout_s: float) -> Any:
    """A torch TCPStore that listens on `port` of all interfaces; 0: on one that is free, which its attribute
    `port` tells.

    Another store that this process opens on the same port shares the server, if it is `multi_tenant` too:
    torch's own for a world is.

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


def open_or_connect(launch: Launch, timeout_s: float) -> tuple[Any, tuple[str, int]]:
    """The job's torch TCPStore, opened by world rank 0 and found by the others, and the address it was
    reached at.

    Raises:
        LostPeerError: the port is taken, or rank 0 did not open it in time, or something else answers there.
        HostfileError: nobody knows the host of rank 0.
    """
    if launch.world_rank == 0:
        tcp = _open(launch, timeout_s)
        # The server listens on all interfaces; its own process takes the shortest way, whatever the others
        # call this machine.
        return tcp, ("127.0.0.1", tcp.port)
    deadline = time.monotonic() + timeout_s
    address = (launch.master_addr, _port_of(launch, deadline, timeout_s))
    _await_listener(launch, address, deadline, timeout_s)
    return _connect(launch, address, deadline), address


def named(launch: Launch, ranks: list[int]) -> str:
    """Ranks with their places, for messages: "rank 2 (host beta, slot 0)"."""
    places = ((rank, *host_of_rank(launch.hosts, rank)) for rank in ranks)
    return ", ".join(f"rank {rank} (host {host.name}, slot {slot})" for rank, host, slot in places)


def write_port(path: Path, port: int) -> None:
    """Leaves a port in a file, which appears whole."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(str(port))
    draft.replace(path)


def read_port(path: Path, deadline: float) -> int | None:
    """The port that `write_port` leaves in a file; None if it has not by `deadline` (of `time.monotonic`)."""
    while True:
        try:
            return int(path.read_text())
        except FileNotFoundError:
            if time.monotonic() >= deadline:
                return None
        time.sleep(_PAUSE_S)


def _open(launch: Launch, timeout_s: float) -> Any:
    if launch.meeting is not None:
        tcp = open_server(0, timeout_s)
        write_port(launch.meeting, tcp.port)
        return tcp
    port = launch.master_port + STORE_PORT_OFFSET
    try:
        return open_server(port, timeout_s)
    except RuntimeError as error:
        raise LostPeerError(
            f"rank 0 cannot open the meeting port {port} on {socket.gethostname()}: {_first_line(error)}; "
            "end the "
            f"program that holds it, or choose another with MASTER_PORT={free_port()} (deepspeed "
            "--master_port)"
        ) from None


def _port_of(launch: Launch, deadline: float, timeout_s: float) -> int:
    if launch.meeting is None:
        return launch.master_port + STORE_PORT_OFFSET
    port = read_port(launch.meeting, deadline)
    if port is None:
        raise LostPeerError(
            f"{named(launch, [0])} did not open a meeting port within {timeout_s:g} s; look at its output, "
            "or raise "
            "cluster.start_timeout_s"
        )
    return port


def _connect(launch: Launch, address: tuple[str, int], deadline: float) -> Any:
    from torch.distributed import TCPStore

    try:
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=left)
    except RuntimeError as error:
        raise LostPeerError(
            f"rank {launch.world_rank} reached {address[0]}:{address[1]}, but no FedSpeed job answered "
            "there: "
            f"{_first_line(error)}; choose another port with MASTER_PORT=..."
        ) from None


def _await_listener(launch: Launch, address: tuple[str, int], deadline: float, timeout_s: float) -> None:
    """Waits until rank 0 listens. A plain socket, because TCPStore prints stack traces over each refused
    connection.
    """
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
                    f"{named(launch, [0])} did not open {address[0]}:{address[1]} within {timeout_s:g} s "
                    f"({error.strerror or error}); look at its output, check that the port is not filtered, "
                    "or raise "
                    "cluster.start_timeout_s"
                ) from None
        time.sleep(_PAUSE_S)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

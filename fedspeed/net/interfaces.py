"""The network interfaces of this machine: which one to listen on, and its name for gloo and NCCL."""

import ipaddress
import socket

LOOPBACK = "127.0.0.1"

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"

_DISCARD_PORT = 9


def is_ip_address(text: str) -> bool:
    """Return whether a text is an IP address; False for a host name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return whether an IP address is reachable from this machine only; False for a host name."""
    return is_ip_address(address) and ipaddress.ip_address(address).is_loopback


def listening_socket(address: str, port: int) -> socket.socket:
    """Return a socket that listens on one IP address of this machine; port 0: on a free port.

    Raises:
        OSError: the port is taken, or this machine does not have the address.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)


def addresses_here(name: str) -> list[str]:
    """Return the IP addresses of a host name that this machine has itself, IPv4 first.

    The order is the same in all processes of this machine. Empty if the name cannot be resolved.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError:
        return []
    return sorted(filter(_is_here, found), key=lambda address: (":" in address, address))


def address_facing(name: str) -> str:
    """Return the address of the interface through which this machine reaches another host.

    Raises:
        OSError: the name cannot be resolved, or there is no route to it.
    """
    # Connecting a datagram socket sends nothing, but makes the kernel choose the outgoing interface.
    family, kind, protocol, _, address = socket.getaddrinfo(name, _DISCARD_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """Return the name of the network interface that has an IP address of this machine.

    Raises:
        OSError: no interface has it.
    """
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        # A link-local IPv6 address carries its interface as a suffix.
        if any(entry.address.partition("%")[0] == address.partition("%")[0] for entry in entries):
            return name
    raise OSError(f"no network interface of this machine has the address {address}")


def _is_here(address: str) -> bool:
    try:
        listening_socket(address, 0).close()
    except OSError:
        return False
    return True

"""Choosing addresses and TCP ports, and not being held up by the name service while connecting."""

import random
import socket

# Below Linux's default ephemeral ports (32768 and above), where any outgoing connection may take a port
# between choice and use.
PORTS = range(20000, 32000)
# The rendezvous listens this far above MASTER_PORT, which a launcher may use itself (torchrun's agent does).
STORE_PORT_OFFSET = 1

# torch looks up the name of each peer's address for its log lines, 127.0.0.1 included, on both sides of every
# connection. One packet lost on the way to the name server then costs glibc's default of 5 s in which no rank
# can connect. Measured on a machine whose resolver drops one packet in twelve: 5 s in every seventh meeting
# of three ranks. Takes effect where the resolver has not been asked before.
RESOLVER_VARIABLE = "RES_OPTIONS"
RESOLVER_OPTIONS = "timeout:1 attempts:3"

_TRIES = 200
_random = random.SystemRandom()


def free_port() -> int:
    """A port of PORTS on which nobody listens on this machine at this moment. Raises OSError if 200 random
    ones are taken.
    """
    for _ in range(_TRIES):
        port = _random.choice(PORTS)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of {_TRIES} ports tried between {PORTS.start} and {PORTS.stop} is free")


def reachable_address(master: str, same_machine: bool) -> str:
    """An address of this machine that the others can reach: the one the first rank is known by, or the one
    that faces it.

    Args:
        master: address or name of the first rank. same_machine: whether it runs here.
    """
    if same_machine:
        return master
    # Connecting a datagram socket sends nothing, but makes the kernel choose the outgoing interface.
    family, kind, protocol, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]

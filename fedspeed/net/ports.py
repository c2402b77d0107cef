"""Choice of TCP ports, and protection against a slow name service while connecting."""

import random
import socket

# Below Linux's default ephemeral ports (32768 and above), where an outgoing connection may take a port
# between its choice and its use.
PORTS = range(20000, 32000)
# The rendezvous listens this far above MASTER_PORT, which a launcher may use itself (torchrun's agent does).
STORE_PORT_OFFSET = 1

# torch looks up the name of each peer's address for its log lines, even of 127.0.0.1, on both sides of every
# connection. One lost packet to the name server then costs glibc's default timeout of 5 s, in which no rank
# can connect. Measured with a resolver that drops one packet in twelve: 5 s in every seventh rendezvous of
# three ranks. The setting takes effect in processes that have not used the resolver yet.
RESOLVER_VARIABLE = "RES_OPTIONS"
RESOLVER_OPTIONS = "timeout:1 attempts:3"

_TRIES = 200
_random = random.SystemRandom()


def free_port() -> int:
    """Return a port of PORTS on which nobody listens on this machine at this moment.

    Raises:
        OSError: 200 random ports are taken.
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

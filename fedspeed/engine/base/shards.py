"""One-sided reads: a rank reads a shard of the base from another node at the moment it needs it.

A thread on the node that stores a shard answers from RAM, so no rank waits for another's pass. (MPI's
one-sided calls promise the same, but over TCP they make progress only while the target is inside MPI.) A
connection opens with a token that the ranks of the cluster have exchanged.
"""

import hmac
import secrets
import socket
import socketserver
import struct
import threading

import torch

from fedspeed.errors import LostPeerError
from fedspeed.net.sockets import receive_exactly, receive_into

_REQUEST = struct.Struct(">QQ")  # offset and length, in bytes
_TOKEN_BYTES = 32
_TOKEN_TIMEOUT_S = 10.0


class ShardServer:
    """Answer reads of `memory` [n] uint8 (CPU) until the process ends or `close`.

    Args:
        host: address to listen on.
        deadline_s: seconds that a reader may take to receive an answer.

    Attributes:
        token: what a reader must send first.
        address: (host, port) that readers connect to.
    """

    def __init__(self, memory: torch.Tensor, host: str, deadline_s: float):
        token = secrets.token_bytes(_TOKEN_BYTES)
        view = memory.numpy().data

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    self.request.settimeout(_TOKEN_TIMEOUT_S)
                    if not hmac.compare_digest(receive_exactly(self.request, _TOKEN_BYTES), token):
                        return
                    while True:
                        self.request.settimeout(None)  # the next request may come at any time
                        at, count = _REQUEST.unpack(receive_exactly(self.request, _REQUEST.size))
                        if at + count > len(view):
                            return
                        self.request.settimeout(deadline_s)
                        self.request.sendall(view[at : at + count])
                except OSError:
                    return  # the reader is gone; the ranks that wait for it report that

        self.token = token
        self._server = socketserver.ThreadingTCPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.address = self._server.server_address[:2]
        threading.Thread(target=self._server.serve_forever, name="base-parts", daemon=True).start()

    def close(self) -> None:
        """Accept no more connections. Connected readers are served until the process ends: they may still be
        in their last pass.
        """
        self._server.shutdown()
        self._server.socket.close()


class ShardReader:
    """A connection to a ShardServer, for one read at a time.

    Args:
        deadline_s: seconds to wait for each piece of an answer.

    Raises:
        LostPeerError: the server does not answer.
    """

    def __init__(self, address: tuple[str, int], token: bytes, deadline_s: float):
        self._name = "{}:{}".format(*address)
        try:
            self._socket = socket.create_connection(address, timeout=deadline_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(token)
        except OSError as error:
            raise self._lost(error) from error

    def read(self, at: int, into: memoryview) -> int:
        """Fill `into` from offset `at`; returns its length.

        Raises:
            LostPeerError: the server is gone, or too slow.
        """
        try:
            self._socket.sendall(_REQUEST.pack(at, len(into)))
            receive_into(self._socket, into)
        except OSError as error:
            raise self._lost(error) from error
        return len(into)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _lost(self, error: OSError) -> LostPeerError:
        return LostPeerError(
            f"the part of the base at {self._name} cannot be read: {error.strerror or error}"
        )


def shards_of(nbytes: int, weights: list[int], align: int) -> list[tuple[int, int]]:
    """Divide [0, nbytes) in proportion to weights: contiguous ranges (start, end) in order, with aligned
    borders.
    """
    total = sum(weights)
    ends = [0]
    so_far = 0
    for weight in weights:
        so_far += weight
        ends.append(nbytes if so_far == total else min(nbytes, nbytes * so_far // total // align * align))
    return list(zip(ends, ends[1:]))

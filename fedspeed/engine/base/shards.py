"""Parts of a divided base, read by whoever needs them at the moment he does: no rank waits for another's
pass.

A thread of the node that holds a part answers out of RAM. (MPI's one-sided calls promise the same, but over
TCP they make progress only while the target is inside MPI.) Connections open with a token that the ranks of
the cluster have given each other.
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
_HELLO_S = 10.0  # for the token of whoever connects


class ShardServer:
    """Answers reads of `memory` [n] uint8 (CPU) until the process ends or `close`.

    Args:
        host: address to listen on.
        deadline_s: for a reader to take what it asked for.
    """

    def __init__(self, memory: torch.Tensor, host: str, deadline_s: float):
        self.token, view = secrets.token_bytes(_TOKEN_BYTES), memoryview(memory.numpy())
        token = self.token

        class Reader(socketserver.BaseRequestHandler):
            def handle(self):
                try:
                    self.request.settimeout(_HELLO_S)
                    if not hmac.compare_digest(receive_exactly(self.request, _TOKEN_BYTES), token):
                        return
                    while True:
                        self.request.settimeout(None)  # it asks whenever it needs something
                        at, count = _REQUEST.unpack(receive_exactly(self.request, _REQUEST.size))
                        if at + count > len(view):
                            return
                        self.request.settimeout(deadline_s)
                        self.request.sendall(view[at : at + count])
                except OSError:
                    return  # it is gone; whoever misses it says so

        self._server = socketserver.ThreadingTCPServer((host, 0), Reader)
        self._server.daemon_threads = True
        self.address = self._server.server_address[:2]
        threading.Thread(target=self._server.serve_forever, name="base-parts", daemon=True).start()

    def close(self) -> None:
        """Accept nobody any more. Readers that are connected are served as long as the process lives: they
        may be a pass behind.
        """
        self._server.shutdown()
        self._server.socket.close()


class ShardReader:
    """One connection to a ShardServer; one read at a time.

    Args:
        deadline_s: for each piece of an answer.

    Raises:
        LostPeerError: nobody answers there.
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
            LostPeerError: the holder is gone, or too slow.
        """
        try:
            self._socket.sendall(_REQUEST.pack(at, len(into)))
            receive_into(self._socket, into)
        except OSError as error:
            raise self._lost(error) from error
        return len(into)

    def close(self) -> None:
        self._socket.close()

    def _lost(self, error: OSError) -> LostPeerError:
        return LostPeerError(
            f"the part of the base at {self._name} cannot be read: {error.strerror or error}"
        )


def shards_of(nbytes: int, weights: list[int], align: int) -> list[tuple[int, int]]:
    """Divide [0, nbytes) among holders: (start, end) of each, in proportion to its weight up to the
    alignment, in order, without a gap.
    """
    total = sum(weights)
    ends = [0]
    so_far = 0
    for weight in weights:
        so_far += weight
        ends.append(nbytes if so_far == total else min(nbytes, nbytes * so_far // total // align * align))
    return list(zip(ends, ends[1:]))

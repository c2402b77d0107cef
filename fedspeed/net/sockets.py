"""Reading a given number of bytes from stream sockets."""

import socket
import time

_LEAST_WAIT_S = 0.001  # a timeout of 0 would turn a blocking socket into one that does not block


def receive_into(connection: socket.socket, buffer: memoryview, end: float | None = None) -> None:
    """Read from a connection until `buffer` is full.

    Args:
        end: time of `time.monotonic` by which it must be full, however slowly the other side sends. What is
            there already is read once after that. None: the socket's own timeout, for each read.

    Raises:
        TimeoutError: the buffer was not full in time.
        OSError: the other side has closed the connection.
    """
    done = 0
    while done < len(buffer):
        if end is not None:
            left_s = end - time.monotonic()
            if done and left_s <= 0:
                raise TimeoutError(f"only {done} of {len(buffer)} bytes arrived in time")
            connection.settimeout(max(_LEAST_WAIT_S, left_s))
        count = connection.recv_into(buffer[done:])
        if count == 0:
            raise ConnectionResetError("the other side has closed the connection")
        done += count


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes. Raises as `receive_into` does."""
    data = bytearray(count)
    receive_into(connection, memoryview(data))
    return bytes(data)

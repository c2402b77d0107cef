"""Reading a given number of bytes from stream sockets."""

import socket


def receive_into(connection: socket.socket, buffer: memoryview) -> None:
    """Read from a connection until `buffer` is full.

    Raises:
        OSError: the other side has closed the connection, or sent nothing for the socket's timeout.
    """
    done = 0
    while done < len(buffer):
        count = connection.recv_into(buffer[done:])
        if count == 0:
            raise ConnectionResetError("the other side has closed the connection")
        done += count


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes. Raises as `receive_into` does."""
    data = bytearray(count)
    receive_into(connection, memoryview(data))
    return bytes(data)

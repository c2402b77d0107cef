"""Reading from stream sockets."""


def receive_into(connection, into: memoryview) -> None:
    """Read until `into` is full.

    Raises:
        OSError: the other side is gone, or silent for longer than the socket's timeout.
    """
    done = 0
    while done < len(into):
        n = connection.recv_into(into[done:])
        if n == 0:
            raise ConnectionResetError("the other side has closed the connection")
        done += n


def receive_exactly(connection, count: int) -> bytes:
    """The next `count` bytes. Raises as `fill` does."""
    data = bytearray(count)
    receive_into(connection, memoryview(data))
    return bytes(data)

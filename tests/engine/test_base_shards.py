"""Parts of the base that other nodes read: what they are cut into, who may read, and what happens when the
holder goes away.
"""

import socket
import struct

import pytest

from fedspeed.engine.base.shards import ShardReader, ShardServer, shards_of
from fedspeed.errors import LostPeerError
from tests.limits import LIMIT_S


@pytest.mark.parametrize(
    "nbytes,weights", [(8192, [1, 1]), (4096 * 7, [2, 1, 1]), (4096, [1, 1, 1]), (0, [1, 2])]
)
def test_parts_cover_everything_once(nbytes, weights):
    parts = shards_of(nbytes, weights, 4096)
    assert parts[0][0] == 0 and parts[-1][1] == nbytes and all(a[1] == b[0] for a, b in zip(parts, parts[1:]))
    for (start, end), weight in zip(parts, weights, strict=True):
        assert start % 4096 == 0 and abs((end - start) - nbytes * weight / sum(weights)) <= 4096


@pytest.fixture
def served():
    import torch

    memory = torch.arange(100_000, dtype=torch.int32).view(torch.uint8)
    server = ShardServer(memory, "127.0.0.1", deadline_s=5)
    yield memory, server
    server.close()


def test_a_reader_gets_the_bytes_it_asks_for(served):
    memory, server = served
    reader = ShardReader(server.address, server.token, 5)
    into = bytearray(1000)
    for at in (0, 12_345, len(memory) - 1000):
        assert reader.read(at, memoryview(into)) == 1000
        assert bytes(into) == bytes(memory[at : at + 1000].tolist())
    reader.close()


def test_one_who_is_served_stays_served_when_nobody_else_is_let_in(served):
    memory, server = served
    reader = ShardReader(server.address, server.token, 5)
    reader.read(0, memoryview(bytearray(10)))
    server.close()
    assert reader.read(0, memoryview(bytearray(10))) == 10
    with pytest.raises(
        LostPeerError, match=r"the part of the base at 127.0.0.1:\d+ cannot be read: Connection refused"
    ):
        ShardReader(server.address, server.token, 5)
    reader.close()


@pytest.mark.parametrize(
    "sent", [b"\0" * 32 + struct.pack(">QQ", 0, 100), b"GET / HTTP/1.0\r\n\r\n" + b" " * 30]
)
def test_a_stranger_gets_nothing(served, sent):
    _, server = served
    with socket.create_connection(server.address, timeout=LIMIT_S) as stranger:
        stranger.sendall(sent)
        try:
            assert stranger.recv(100) == b""
        except ConnectionResetError:
            pass


@pytest.mark.parametrize("at,count", [(399_999, 2), (2**63, 10), (0, 2**63)])
def test_a_read_beyond_the_part_ends_the_connection(served, at, count):
    _, server = served
    with socket.create_connection(server.address, timeout=LIMIT_S) as reader:
        reader.sendall(server.token + struct.pack(">QQ", at, count))
        assert reader.recv(100) == b""

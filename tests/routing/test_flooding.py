"""A member of the roster against the memory of the others: it has a valid key, and sends what nobody expects.

The honest sites are threads of one process of their own, whose peak memory is compared with that of idle
sites.
"""

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from fedspeed.routing.transports import tls
from fedspeed.routing.transports.frame_reader import MESSAGE
from fedspeed.routing.transports.tls_sockets import ssl_context
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.routing.sites import Sites

MIB = 1 << 20
DUE = 8  # bytes that the honest sites expect in step (1, 1)
MAX_GROWTH_MIB = 8

HONEST = """
import json, resource, sys, threading
from pathlib import Path
import numpy as np
from fedspeed.routing.transport import PeersLost
from tests.limits import LIMIT_S
from tests.routing.contract import in_threads
from tests.routing.sites import Sites

folder, size = Path(sys.argv[1]), int(sys.argv[2])
sites = Sites.in_folder(folder, size)

def meet(transport):
    '''Lose the liar in a step or in the recovery from it, and go on among the honest.'''
    reasons = []
    for phase in (1, 0):
        try:
            transport.swap([bytes(8)] * size, [8] * size, LIMIT_S, (1, phase))
            reasons.append("")
        except PeersLost as error:
            reasons.append(str(error))
            if error.peers:
                break
    last = size - 1
    part = np.full(1 << 20, transport.rank, np.uint8)
    sizes = [part.size] * last + [0]
    came = transport.swap([part] * last + [b""], sizes, LIMIT_S, (2, 1))
    return reasons, [int(one[0]) for one in came[:last]]

for line in sys.stdin:
    transports = sites.all(first=size - 1)
    print("connected", flush=True)
    sys.stdin.readline()
    results = in_threads(transports, meet)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    for transport in transports:
        transport.close()
    print(json.dumps({"peak": peak, "results": results}), flush=True)
"""


def header(step, nbytes: int) -> bytes:
    return tls._HEADER.pack(tls._MAGIC, *step, nbytes)


def idle() -> Iterator[bytes]:
    yield from ()


def oversized() -> Iterator[bytes]:
    """Send 2^24 bytes where 8 are due, as often as they are taken."""
    for _ in range(4):
        yield header((1, 1), 1 << 24)
        yield from [bytes(MIB)] * 16


def announced() -> Iterator[bytes]:
    """Announce 32 GiB."""
    yield header((1, 1), 1 << 35)
    yield from [bytes(MIB)] * 64


def unasked() -> Iterator[bytes]:
    """Send large messages that nobody waits for."""
    for _ in range(16):
        yield header(MESSAGE, 4 * MIB)
        yield from [bytes(MIB)] * 4


def crumbs() -> Iterator[bytes]:
    """Send very many messages of one byte."""
    yield from [1000 * (header(MESSAGE, 1) + b"x")] * 250


def early() -> Iterator[bytes]:
    """Send a large frame of a later step, and never what is due."""
    for phase in (2, 3, 4, 5):
        yield header((1, phase), 16 * MIB)
        yield from [bytes(MIB)] * 16


# By attack, what the honest sites report of site 2 or 3.
ATTACKS = {
    idle: "the other side has closed the connection",
    oversized: "sent 16777216 bytes where 8 are due",
    announced: "sent 34359738368 bytes where 8 are due",
    unasked: "sent 4194304 bytes that nobody had asked for",
    crumbs: "sent 1 bytes that nobody had asked for",
    early: "the other side has closed the connection",
}


def dialled(sites: Sites, me: int, peer: int, direction: bytes) -> ssl.SSLSocket:
    """Connect as member `me` to one that listens, which may not do so yet."""
    context = ssl_context(ssl.PROTOCOL_TLS_CLIENT, str(sites.folder / f"site{me}.key"), sites.roster)
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            raw = socket.create_connection(sites.roster.members[peer].host_and_port, LIMIT_S)
            break
        time.sleep(0.05)
    secured = context.wrap_socket(raw)
    secured.sendall(direction + sites.roster.digest)
    assert secured.recv(1) == tls._WELCOME
    return secured


def flood(connection: ssl.SSLSocket, attack, is_full: threading.Event) -> None:
    """Send all of an attack, and close; note when the other side takes no more for now."""
    connection.settimeout(LIMIT_S)
    with contextlib.suppress(OSError):
        for data in attack():
            timer = threading.Timer(0.3, is_full.set)
            timer.start()
            connection.sendall(data)
            timer.cancel()
        connection.close()
    is_full.set()


@pytest.mark.parametrize("size", [3, 4])
def test_a_member_cannot_fill_the_memory_of_others(tmp_path, size):
    sites = Sites(tmp_path, size)
    liar = size - 1
    honest = subprocess.Popen(
        [sys.executable, "-c", HONEST, str(tmp_path), str(size)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(LIMIT_S, honest.kill)
    timer.start()
    peaks = {}
    try:
        for attack, reason in ATTACKS.items():
            print("begin", file=honest.stdin, flush=True)
            writers = [dialled(sites, liar, peer, b"w") for peer in range(liar)]
            readers = [dialled(sites, liar, peer, b"r") for peer in range(liar)]
            assert honest.stdout.readline() == "connected\n"
            full = [threading.Event() for _ in writers]
            threads = [
                threading.Thread(target=flood, args=(writer, attack, event))
                for writer, event in zip(writers, full, strict=True)
            ]
            for thread in threads:
                thread.start()
            for event in full:
                assert event.wait(LIMIT_S)
            print("go", file=honest.stdin, flush=True)
            report = json.loads(honest.stdout.readline())
            for reasons, came in report["results"]:
                assert f"site{liar}" in reasons[-1] and reason in reasons[-1], (attack.__name__, reasons)
                assert came == list(range(liar)), "the honest ones go on"
            peaks[attack.__name__] = report["peak"]
            for connection in (*writers, *readers):
                connection.close()
            for thread in threads:
                thread.join(LIMIT_S)
        assert max(peaks.values()) <= peaks["idle"] + MAX_GROWTH_MIB, peaks
    finally:
        timer.cancel()
        honest.stdin.close()
        honest.kill()
        honest.wait()

"""What a running site listens on: its TLS port, and on loopback what connects its own ranks."""

import contextlib
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.limits import LIMIT_S
from tests.listening import listening_sockets
from tests.run.sites import Federation
from tests.run.test_run_resume import SLOW

# Of torch's TCPStore: a connection opens with a magic number, and a ping is answered with its number.
VALIDATE = struct.pack("<BI", 0, 0x3C85F7CE)
PING = struct.pack("<BI", 13, 77)


@pytest.fixture(scope="module")
def running(shared_workshop):
    """Three sites in a round, the first one with two ranks: what each listens on, and how the run ended after
    a stranger had called at each port.
    """
    federation = Federation(shared_workshop, "listening", 3)
    env = SLOW | {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    rounds = "federation.rounds=12"
    started = federation.start_sites(rounds, "cluster.local_ranks=2", env=env, sites=(0,))
    started += federation.start_sites(rounds, env=env, sites=(1, 2))
    federation.until_a_round(started)
    opened = [listening_sockets(site.family()) for site in started]
    ports = [port for sockets in opened for _, port in sockets]
    with ThreadPoolExecutor(len(ports)) as pool:
        found = {port for port, answers in zip(ports, pool.map(is_store, ports)) if answers}
    stores = [[port for _, port in sockets if port in found] for sockets in opened]
    for sockets in opened:
        for address, port in sockets:
            call(address, port)
    assert all(site.process.poll() is None for site in started), "the sites listened all the time"
    ended = [site.wait() for site in started]
    return federation, opened, stores, ended


def is_store(port: int) -> bool:
    """Return whether a torch store answers on a port of loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(1)  # gloo keeps a connection that it does not understand
        stranger.sendall(VALIDATE + PING)
        return stranger.recv(4) == PING[1:]
    return False


def call(address: str, port: int) -> None:
    """Send what no protocol is."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=LIMIT_S) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))


def test_no_site_listens_beyond_loopback_but_on_its_own_port(running):
    federation, opened, _, _ = running
    for port, sockets in zip(federation.ports, opened):
        assert [found for found in sockets if found[1] == port] == [("127.0.0.1", port)]
        assert {address for address, _ in sockets} == {"127.0.0.1"}


def test_a_site_of_one_rank_has_no_store_on_the_network(running):
    _, _, stores, _ = running
    assert stores[0], "the ranks of a site of two find each other in a store"
    assert stores[1:] == [[], []]


def test_a_stranger_at_every_port_changes_nothing(running):
    federation, _, _, ended = running
    assert [site.code for site in ended] == [0, 0, 0], "\n".join(site.text for site in ended)
    assert all("Traceback" not in site.text for site in ended)
    adapters = {(federation.run(i) / "adapter" / "adapter_model.safetensors").read_bytes() for i in range(3)}
    assert len(adapters) == 1

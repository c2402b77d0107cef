"""On which address of its machine rank 0 opens the job's store, and what a rank makes of what is in it."""

import json
import os
import threading
from dataclasses import replace

import pytest
from torch.distributed import HashStore, TCPStore

from fedspeed.cluster import store_connection
from fedspeed.cluster.discover import Launch
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.rendezvous import Peer, Store, meet
from fedspeed.cluster.store_connection import open_server, store_address
from fedspeed.cluster.store_values import read_values
from fedspeed.cluster.torch_world import torch_world_env
from fedspeed.errors import HostfileError, LostPeerError
from fedspeed.net.interfaces import address_facing, addresses_here, interface_of
from fedspeed.net.ports import STORE_PORT_OFFSET
from tests.limits import LIMIT_S
from tests.listening import listening_sockets
from tests.processes import free_port

HOSTS = (Host("alpha", 2), Host("beta", 1))
# What the names are on the machine of rank 0, whose interfaces have 10.0.0.1 and 10.1.0.1.
HERE = {"alpha": ["10.0.0.1"], "debian": ["127.0.1.1"], "both": ["127.0.1.1", "10.1.0.1"]}


def launch_of(rank: int, master_addr: str = "127.0.0.1", port: int = 0, **more) -> Launch:
    return Launch(
        "openmpi", rank, 3, local_rank=rank, hostfile=None, hosts=HOSTS, master_addr=master_addr,
        master_port=port, **more
    )  # fmt: skip


@pytest.fixture
def names(monkeypatch):
    """Replace the name service: beta is reached through 10.0.0.1."""

    def facing(name: str) -> str:
        if name != "beta":
            raise OSError(name)
        return "10.0.0.1"

    monkeypatch.setattr(store_connection, "addresses_here", lambda name: HERE.get(name, []))
    monkeypatch.setattr(store_connection, "address_facing", facing)


@pytest.mark.parametrize(
    ("master_addr", "address"),
    [
        ("alpha", "10.0.0.1"),
        ("both", "10.1.0.1"),
        ("debian", "10.0.0.1"),
        ("forwarded.example", "10.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_first_host_listens_where_the_others_connect(names, master_addr, address):
    assert [store_address(launch_of(rank, master_addr)) for rank in (0, 1)] == [address, address]
    assert store_address(launch_of(2, master_addr)) == master_addr


def test_one_machine_listens_on_loopback_whatever_it_is_called(names):
    for rank in range(3):
        assert store_address(launch_of(rank, "alpha", one_machine=True)) == "127.0.0.1"


def test_a_first_host_without_an_address_is_refused(names):
    launch = replace(launch_of(0, "no-such-host.invalid"), hosts=(Host("no-such-host.invalid", 3),))
    with pytest.raises(HostfileError, match=r"cannot resolve .*`no-such-host.invalid`.*MASTER_ADDR"):
        meet(launch, 1)


def test_a_first_host_that_only_it_can_reach_says_so(monkeypatch):
    monkeypatch.setattr(store_connection, "addresses_here", lambda name: ["127.0.0.1"])
    monkeypatch.setattr(store_connection, "address_facing", lambda name: "127.0.0.1")
    with pytest.raises(LostPeerError, match=r"listens on 127.0.0.1 only, since `alpha` has no other address"):
        meet(launch_of(0, "alpha", free_port(1 + STORE_PORT_OFFSET)), 0.2)


def test_addresses_and_interfaces_of_this_machine():
    assert addresses_here("127.0.0.1") == ["127.0.0.1"]
    assert addresses_here("192.0.2.99") == [], "an address of documentation"
    assert addresses_here("no-such-host.invalid") == []
    assert address_facing("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(OSError, match=r"no network interface of this machine has the address 192.0.2.99"):
        interface_of("192.0.2.99")


def met(master_addr: str, port: int) -> list:
    """Return the stores of three ranks of two hosts, which this machine emulates."""
    stores = [None] * 3

    def join(rank: int) -> None:
        stores[rank] = meet(launch_of(rank, master_addr, port), LIMIT_S)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return stores


def test_a_job_listens_on_the_launchers_address_only():
    """127.0.0.2 stands for the address by which other hosts know this one."""
    port = free_port(1 + STORE_PORT_OFFSET)
    before = listening_sockets([os.getpid()])
    stores = met("127.0.0.2", port)
    opened = set(listening_sockets([os.getpid()])) - set(before)
    assert opened == {("127.0.0.2", port + STORE_PORT_OFFSET)}
    assert stores[0].address == stores[2].address == ("127.0.0.2", port + STORE_PORT_OFFSET)


def test_gloo_takes_the_users_interface_between_machines_only(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    other = Store(HashStore(), ("192.0.2.99", 1), 0)
    other.peers = (Peer(0, "here", 1), Peer(1, "elsewhere", 1))
    with pytest.raises(HostfileError, match=r"192.0.2.99; set MASTER_ADDR .* GLOO_SOCKET_IFNAME"):
        other.interfaces([0, 1])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    store = met("127.0.0.1", free_port(1 + STORE_PORT_OFFSET))[1]
    assert store.interfaces([0, 1, 2]) == "lo", "all ranks run on one machine"
    store.peers = (*store.peers[:2], replace(store.peers[2], hostname="elsewhere"))
    store.address = ("192.0.2.99", 1)
    assert store.listen_address([0, 1, 2]) == "192.0.2.99"
    assert store.interfaces([0, 1, 2]) == "ib0"
    assert store.interfaces([0, 1]) == "lo"


def test_a_job_of_one_rank_opens_no_socket():
    before = listening_sockets([os.getpid()])
    launch = replace(launch_of(0, one_machine=True), world_size=1, hosts=(Host("alpha", 1),))
    store = meet(launch, LIMIT_S)
    assert store.add("counter", 2) == 2
    assert store.is_first("a") and not store.is_first("a")
    assert store.wait(["absent"], 0.01) == {"absent"}
    other = store.connect("prefix", LIMIT_S)
    other.set("key", "value")
    assert store.get("prefix/key") == ["value"]
    env = torch_world_env(store, [0], launch, LIMIT_S)
    assert "MASTER_PORT" not in env
    assert env["GLOO_SOCKET_IFNAME"] == "lo" and env["NCCL_SOCKET_IFNAME"] == "=lo"
    assert listening_sockets([os.getpid()]) == before


MALFORMED = ("", "5", "null", "[]", '{"hostname": "x"}', "[" * 100_000, '{"pid": Infinity', "\x1b[2J")


@pytest.mark.parametrize("value", MALFORMED)
def test_a_malformed_value_ends_with_a_message(value):
    """A stranger that reaches the store announces the rank that has not come."""
    port = free_port(1 + STORE_PORT_OFFSET)
    errors = []

    def join(rank: int) -> None:
        try:
            meet(launch_of(rank, port=port), LIMIT_S)
        except LostPeerError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    _, (host, store_port) = store_connection.open_or_connect(launch_of(2, port=port), LIMIT_S)
    stranger = TCPStore(host, store_port, is_master=False, wait_for_workers=False)
    stranger.set("fedspeed/here/2", value)
    stranger.set("fedspeed/read/2", "")
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(errors) == 2
    assert all("`fedspeed/here/2`" in error and "another program has written it" in error for error in errors)
    assert all(error.isprintable() and len(error) < 400 for error in errors)


def test_a_value_that_can_be_parsed_is_returned():
    class Texts:
        def get(self, *keys):
            return [json.dumps(key) for key in keys]

    assert read_values(Texts(), ["a", "b"], json.loads) == ["a", "b"]


def test_a_server_listens_on_its_address_only():
    before = listening_sockets([os.getpid()])
    store = open_server("127.0.0.1", 0, LIMIT_S)
    assert set(listening_sockets([os.getpid()])) - set(before) == {("127.0.0.1", store.port)}

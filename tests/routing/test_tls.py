"""The transport between organisations beyond the contract: sites that stop, and strangers who reach the
port.
"""

import contextlib
import json
import socket
import ssl
import threading
import time

import numpy as np
import pytest

from fedspeed.errors import ConfigError, FedSpeedError
from fedspeed.routing import identity
from fedspeed.routing.listen_address import check_port
from fedspeed.routing.transport import PeersLost, TransportError
from fedspeed.routing.transports import tls
from fedspeed.routing.transports.frames import Frame
from fedspeed.routing.transports.tls import MAX_HANDSHAKES
from tests.limits import LIMIT_S
from tests.routing.contract import contract, in_threads
from tests.routing.sites import Sites


def test_large_frames_in_both_directions_at_once(tmp_path):
    transports = Sites(tmp_path, 3).all()

    def act(t):
        parts = [np.full(20_000_000, 16 * t.rank + i, np.uint8) for i in range(3)]
        came = t.swap(parts, [20_000_000] * 3, LIMIT_S)
        return [int(c[0]) for c in came], [bool((c == c[0]).all()) for c in came]

    for i, (firsts, equal) in enumerate(in_threads(transports, act)):
        assert firsts == [16 * sender + i for sender in range(3)] and all(equal)
    for transport in transports:
        transport.close()


def test_a_site_that_stops_reading_delays_nobody_else(tmp_path):
    """Its connections stay open, and large frames are on their way to it. Whoever has waited in vain keeps
    none of those that it could not send.
    """
    transports = Sites(tmp_path, 4).all()

    def act(t):
        if t.rank == 1:
            return None  # it takes part in no swap, and so reads nothing
        begin = time.monotonic()
        part = np.full(12_000_000, t.rank, np.uint8)
        with pytest.raises(PeersLost) as lost:
            t.swap([part] * 4, [part.size] * 4, 4)
        apart = t.swap([part[:100]] * 4, [100 if i != 1 else 0 for i in range(4)], LIMIT_S)
        for _ in range(2):
            t._outgoing[1].put((Frame((0, 1), [part]), 0.0))  # as if it had been sent before the loss
        end = time.monotonic() + LIMIT_S
        while not t._outgoing[1].empty() and time.monotonic() < end:
            time.sleep(0.05)
        assert t._outgoing[1].empty() and 1 in t._broken
        return lost.value.peers, [int(c[0]) for i, c in enumerate(apart) if i != 1], time.monotonic() - begin

    found = [one for one in in_threads(transports, act) if one]
    assert [f[:2] for f in found] == 3 * [(frozenset({1}), [0, 2, 3])] and all(
        f[2] < LIMIT_S / 10 for f in found
    )
    for transport in transports:
        transport.close()


def test_what_a_site_sends_ahead_stays_on_its_connection(tmp_path):
    """A site whose next step needs nothing of another one runs ahead of it. What it sends is read when the
    other one gets there, and the frames that others wait for are not held up by it.
    """
    sites = Sites(tmp_path, 3).all()
    size = 20_000_000
    is_ahead = threading.Event()

    def act(t):
        part = np.full(size, t.rank, np.uint8)
        if t.rank == 1:
            for phase in (1, 2):
                t.swap([part + np.uint8(10 * phase), b"", b""], [0, 0, 0], LIMIT_S, (1, phase))
            is_ahead.set()
        if t.rank == 2:
            assert is_ahead.wait(LIMIT_S)
            t.swap([part, b"", b""], [0, 0, 0], LIMIT_S, (1, 1))
        if t.rank:
            return None
        came = t.swap([b""] * 3, [0, size, size], LIMIT_S, (1, 1))
        assert t._readers[1].ahead_bytes == 0
        later = t.swap([b""] * 3, [0, size, 0], LIMIT_S, (1, 2))
        return [int(one[0]) for one in (came[1], came[2], later[1])]

    assert in_threads(sites, act)[0] == [11, 2, 21]
    for site in sites:
        site.close()


def knock(address, sent: bytes) -> bytes:
    """Return what an address answers to a stranger before it closes the connection, which it may do at any
    moment.
    """
    answer = b""
    with socket.create_connection(address, timeout=LIMIT_S) as stranger, contextlib.suppress(OSError):
        stranger.sendall(sent)
        stranger.shutdown(socket.SHUT_WR)
        while piece := stranger.recv(1000):
            answer += piece
    return answer


def stranger_context(folder, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if key:
        context.load_cert_chain(str(folder / key))
    return context


def test_strangers_get_no_further_than_the_handshake_and_the_run_goes_on(tmp_path, capfd):
    """Strangers without TLS, without a certificate, or with one that is in no roster; members that are
    connected already; connections that send nothing.
    """
    sites = Sites(tmp_path, 3)
    transports = sites.all()
    address = sites.roster.members[0].host_and_port
    assert knock(address, b"GET / HTTP/1.0\r\n\r\n")[:4] != b"HTTP"
    identity.make("stranger", "127.0.0.1:9", tmp_path)
    for key in ("", "stranger.key"):
        with socket.create_connection(address, timeout=LIMIT_S) as raw, pytest.raises(OSError):
            with stranger_context(tmp_path, key).wrap_socket(raw) as secured:
                secured.sendall(b"w" + sites.roster.digest)
                assert secured.recv(1) == b""
                raise OSError("closed without an answer")
    silent = [socket.create_connection(address, timeout=LIMIT_S) for _ in range(40)]
    with socket.create_connection(address, timeout=LIMIT_S) as raw:  # a member, connected already
        with pytest.raises(OSError), stranger_context(tmp_path, "site2.key").wrap_socket(raw) as secured:
            secured.sendall(b"w" + sites.roster.digest)
            if secured.recv(1) in (b"", b"y"):
                assert secured.recv(1) == b""
                raise OSError("closed")
    assert len({r["digest"] for r in in_threads(transports, contract)}) == 1
    for one in silent:
        one.close()
    for transport in transports:
        transport.close()
    lines = [
        line for line in capfd.readouterr().err.splitlines() if "refused a connection from 127.0.0.1" in line
    ]
    assert 2 <= len(lines) <= 10, lines


def test_strangers_that_keep_dialling_do_not_keep_members_apart(tmp_path):
    """More of them than handshakes are allowed at once, from before the members start until after they are
    connected.
    """
    sites = Sites(tmp_path, 3)
    done = threading.Event()
    opened = []

    def crowd():
        while not done.wait(0.005):
            with contextlib.suppress(OSError):
                opened.append(
                    socket.create_connection(sites.roster.members[0].host_and_port, timeout=LIMIT_S)
                )

    def crowded(least=2 * MAX_HANDSHAKES):
        while len(opened) < least:
            time.sleep(0.05)

    thread = threading.Thread(target=crowd)
    thread.start()
    try:
        transports = sites.all(crowded, 8)  # less than a handshake may take
        assert all(transports)
        crowded(len(opened) + MAX_HANDSHAKES)
        assert len({r["digest"] for r in in_threads(transports, contract)}) == 1
    finally:
        done.set()
        thread.join()
        for one in opened:
            one.close()
    for transport in transports:
        transport.close()


def test_a_site_that_waits_reports_for_whom_at_once_and_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tls, "REPORT_S", 0.1)
    sites = Sites(tmp_path, 3)
    with pytest.raises(
        TransportError, match="site0, site2 did not connect within 1 s: site0 .127.0.0.1:.*Connection refused"
    ):
        sites.transport(1, 1)
    lines = capfd.readouterr().err.splitlines()
    addresses = [card.address for card in sites.roster.members]
    assert (
        lines[0]
        == f"fedspeed: site1 listens on {addresses[1]}, which site1's card in {sites.roster_file} says"
    )
    first = lines[1].replace("Connection refused", "no answer yet")  # as the case may be
    assert (
        first == f"fedspeed: waiting for site0 ({addresses[0]}: no answer yet); site2 (connects to this site "
        f"at {addresses[1]}); 1 s left"
    )
    assert f"site0 ({addresses[0]}: Connection refused)" in lines[-1] and len(lines) > 5
    for transport in sites.all():
        transport.close()
    assert capfd.readouterr().err.count("fedspeed: all 3 sites are connected") == 3


def test_a_port_that_cannot_be_opened_is_bad_input(tmp_path):
    sites = Sites(tmp_path, 2)
    _, port = sites.roster.members[0].host_and_port
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(
            ConfigError,
            match=rf"cannot listen on 127.0.0.1:{port}, which site0's card in .*roster.json says: Address "
            rf"already in use; "
            rf"end the program .*sport = :{port}.*routing.listen=HOST:PORT",
        ) as caught:
            sites.transport(0)
        assert caught.value.exit_code == 2
        with pytest.raises(
            ConfigError, match=f"which routing.listen=127.0.0.1:{port} says: Address already in use"
        ):
            check_port(sites.routing(0, listen=f"127.0.0.1:{port}"))
    check_port(sites.routing(0))
    check_port(sites.routing(0))  # nothing is left open
    with pytest.raises(
        ConfigError, match=r"cannot listen on 192.0.2.1:4, .*an address of this machine.*0.0.0.0:4"
    ):
        check_port(sites.routing(0, listen="192.0.2.1:4"))


def test_another_roster_is_refused(tmp_path, capfd):
    sites = Sites(tmp_path, 2)
    cards = list(sites.roster.members)
    other = tmp_path / "other.json"
    other.write_text(identity.sign_roster(cards, sites.signer, 2))
    newer = identity.read_roster(other, sites.pinned)

    def one(i):
        with pytest.raises(TransportError, match="did not connect within 2 s"):
            sites.transport(i, 2, newer if i else sites.roster)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert "has another roster" in capfd.readouterr().err


def test_a_site_that_leaves_is_noticed_at_once_and_the_others_go_on(tmp_path):
    transports = Sites(tmp_path, 3).all()

    def act(t):
        if t.rank == 1:
            t.close()
            return None
        begin = time.monotonic()
        with pytest.raises(PeersLost, match="site1: the other side has closed") as lost:
            t.swap([b"x" * 10] * 3, [10] * 3, LIMIT_S)
        assert lost.value.peers == {1} and time.monotonic() - begin < LIMIT_S / 10
        came = t.swap([b"x" * 10, b"", b"x" * 10], [10, 0, 10], LIMIT_S, (1, 1))
        return [len(c) for c in came]

    assert in_threads(transports, act) == [[10, 0, 10], None, [10, 0, 10]]
    for transport in transports:
        transport.close()


# Identities and rosters.


def test_a_roster_is_what_the_pinned_key_has_signed(tmp_path):
    sites = Sites(tmp_path, 3)
    values = json.loads(sites.roster_file.read_text())
    changed = tmp_path / "changed.json"
    values["members"][1]["address"] = "127.0.0.1:999"
    changed.write_text(json.dumps(values))
    with pytest.raises(FedSpeedError, match="signature is not valid"):
        identity.read_roster(changed, sites.pinned)
    with pytest.raises(FedSpeedError, match="pin the key of who runs the federation"):
        identity.read_roster(sites.roster_file, "")
    identity.make("mallory", "127.0.0.1:1", tmp_path)
    forged = tmp_path / "forged.json"
    forged.write_text(
        identity.sign_roster(sites.roster.members, identity.read_key(tmp_path / "mallory.key"), 1)
    )
    with pytest.raises(FedSpeedError, match="signed by .*, but routing.roster_signer="):
        identity.read_roster(forged, sites.pinned)
    for text in (
        "",
        "[]",
        "{}",
        json.dumps({**values, "members": [{}]}),
        json.dumps({**values, "signature": "zz"}),
    ):
        changed.write_text(text)
        with pytest.raises(FedSpeedError, match="changed.json"):
            identity.read_roster(changed, sites.pinned)


def test_a_roster_says_who_is_the_server(tmp_path):
    sites = Sites(tmp_path, 3)
    assert sites.roster.server is None
    sites.roster_file.write_text(identity.sign_roster(sites.roster.members, sites.signer, 2, server="site1"))
    assert identity.read_roster(sites.roster_file, sites.pinned).server == 1
    sites.roster_file.write_text(
        sites.roster_file.read_text().replace('"server": "site1"', '"server": "site2"')
    )
    with pytest.raises(FedSpeedError, match="signature is not valid"):
        identity.read_roster(sites.roster_file, sites.pinned)
    with pytest.raises(FedSpeedError, match="the server site7 is no member"):
        identity.sign_roster(sites.roster.members, sites.signer, 2, server="site7")


def test_two_members_must_differ(tmp_path):
    sites = Sites(tmp_path, 2)
    with pytest.raises(FedSpeedError, match="same name, site0"):
        identity.sign_roster([sites.roster.members[0], sites.roster.members[0]], sites.signer, 1)


def test_private_keys_are_for_their_owner_and_made_once(tmp_path):
    secret, _ = identity.make("a", "host:1", tmp_path)
    assert secret.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FedSpeedError, match="is there already"):
        identity.make("a", "host:1", tmp_path)
    secret.chmod(0o644)
    with pytest.raises(FedSpeedError, match="others may read this private key; chmod 600"):
        identity.read_key(secret)
    for name, address in (("../b", "host:1"), ("b", "host"), ("b", "host:0"), ("b", ":1"), ("", "host:1")):
        with pytest.raises(FedSpeedError):
            identity.make(name, address, tmp_path)

import pytest

from tests.lab.errors import LabError
from tests.lab.hosts import etc_hosts, parse_rate, place, read_hosts
from tests.lab.network import port, shaping


def test_hosts_get_addresses_in_the_order_of_the_file(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("alpha slots=2\n\n# fed-host alpha link_gbps=2.5\nbeta slots=1\n")
    assert [host.rate for host in read_hosts(hostfile)] == [2_500_000_000, None]
    alpha, beta = read_hosts(hostfile, rate="1gbit")
    assert (alpha.name, alpha.slots, alpha.rate) == ("alpha", 2, 10**9)
    assert (beta.name, beta.slots, beta.address) == ("beta", 1, "10.77.0.2")
    assert etc_hosts((alpha, beta)) == "127.0.0.1 localhost\n10.77.0.1 alpha\n10.77.0.2 beta\n"
    assert port(alpha) != port(beta)


@pytest.mark.parametrize(
    "text, bits", [("200mbit", 200_000_000), ("2.5gbit", 2_500_000_000), ("64KBIT", 64_000)]
)
def test_rates(text, bits):
    assert parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "200", "0mbit", "-1mbit", "1gb", "fast"])
def test_a_rate_without_sense_is_refused(text):
    with pytest.raises(LabError, match="mbit"):
        parse_rate(text)


@pytest.mark.parametrize(
    "hosts, says",
    [
        ([], "no host"),
        ([("localhost", 1, None)], "localhost"),
        ([("127.0.0.1", 1, None)], "127.0.0.1"),
        ([("../up", 1, None)], "up"),
        ([("a", 1, None), ("a", 2, None)], "twice"),
        ([(f"h{number}", 1, None) for number in range(255)], "255 hosts"),
    ],
)
def test_hosts_that_cannot_be_are_refused(hosts, says):
    with pytest.raises(LabError, match=says):
        place(hosts, source="hosts")


def test_a_slow_link_still_passes_whole_packets_and_a_fast_one_a_longer_burst():
    assert shaping("eth0", 10**6) == "qdisc add dev eth0 root tbf rate 1000000bit burst 131072b latency 50ms"
    assert "burst 2500000b" in shaping("eth0", 10**10)

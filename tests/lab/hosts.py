"""The hosts of a virtual cluster: names, slots, addresses and link rates. Pure functions of a hostfile."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from fedspeed.cluster.hostfile import Host, read
from tests.lab.errors import LabError

# All labs use the same range, because their network namespaces have no route to anything else.
NETWORK = ipaddress.ip_network("10.77.0.0/24")

_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")  # safe as the name of a folder
_RATE = re.compile(r"^(\d+(?:\.\d+)?)(k|m|g)bit$")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class LabHost:
    """One virtual host. `rate` is the speed of its link in bit/s, the same in both directions; None: not
    limited.
    """

    name: str
    slots: int
    address: str
    rate: int | None


def read_hosts(hostfile: Path | str, rate: str | None = None) -> tuple[LabHost, ...]:
    """Return the hosts of `hostfile` in its order.

    Args:
        rate: link speed of all hosts, such as "200mbit"; None: each host's `link_gbps`, and no limit where
            the file states none.

    Raises:
        HostfileError: the file is missing or wrong.
        LabError: its hosts cannot be virtual ones, or the rate cannot be read.
    """
    bits = None if rate is None else parse_rate(rate)

    def speed(host: Host) -> int | None:
        return bits if bits or host.link_gbps is None else int(host.link_gbps * 10**9)

    return place(
        [(host.name, host.slots, speed(host)) for host in read(hostfile).hosts], source=str(hostfile)
    )


def place(hosts: list[tuple[str, int, int | None]], source: str = "hosts") -> tuple[LabHost, ...]:
    """Return the hosts, given as (name, slots, rate in bit/s), with the addresses of NETWORK in order.

    Raises:
        LabError: there are none or too many, or a name is not allowed.
    """
    addresses = list(NETWORK.hosts())
    if not hosts:
        raise LabError(f"{source}: no host; write one `NAME slots=N` a line")
    if len(hosts) > len(addresses):
        raise LabError(
            f"{source}: {len(hosts)} hosts, but the lab's network {NETWORK} holds {len(addresses)}"
        )
    seen = set()
    for name, _, _ in hosts:
        if name == "localhost" or _is_address(name) or not _NAME.match(name) or name in seen:
            reason = (
                "is named twice"
                if name in seen
                else "cannot be a virtual host; give it another host name, such as node1"
            )
            raise LabError(f"{source}: {name!r} {reason}")
        seen.add(name)
    return tuple(
        LabHost(name, slots, str(address), rate)
        for (name, slots, rate), address in zip(hosts, addresses, strict=False)
    )


def parse_rate(text: str) -> int:
    """Return bit/s of a rate such as "200mbit", "2.5gbit" or "64kbit".

    Raises:
        LabError: `text` has another form, or is zero.
    """
    match = _RATE.match(text.strip().lower())
    bits = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if bits <= 0:
        raise LabError(f"rate {text!r}: write a positive number with its unit, such as 200mbit or 10gbit")
    return bits


def etc_hosts(hosts: tuple[LabHost, ...]) -> str:
    """Return the text of /etc/hosts on every virtual host."""
    return "".join(["127.0.0.1 localhost\n", *(f"{host.address} {host.name}\n" for host in hosts)])


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

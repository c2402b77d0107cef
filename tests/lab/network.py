"""The lab's network: a switch (a bridge) in the lab's namespace, and a cable (a veth pair) from it to each
host.
"""

import subprocess

from tests.lab.errors import LabError
from tests.lab.hosts import NETWORK, LabHost

SWITCH = "switch"
_TIMEOUT_S = 120.0

# The token bucket of a link has the traffic of 2 ms, but at least two segmentation-offload packets of 64 KiB,
# which tbf would otherwise split. Its queue has up to 50 ms of traffic before packets are dropped.
_BURST_S = 0.002
_SMALLEST_BURST = 128 * 1024
_QUEUE_MS = 50


def make_switch(lab_pid: int) -> None:
    """Make the switch in the network namespace of process `lab_pid`."""
    _batch(lab_pid, "ip", [f"link add {SWITCH} type bridge", f"link set {SWITCH} up"])


def plug(host: LabHost, lab_pid: int, host_pid: int) -> None:
    """Connect the namespace of `host_pid` to the switch as eth0, with the host's address and rate.

    Raises:
        LabError: the kernel refuses a step.
    """
    _batch(
        lab_pid,
        "ip",
        [
            f"link add {port(host)} type veth peer name eth0 netns {host_pid}",
            f"link set {port(host)} master {SWITCH} up",
        ],
    )
    _batch(
        host_pid,
        "ip",
        [
            "link set lo up",
            f"link set eth0 address {hardware_address(host)} up",
            f"address add {host.address}/{NETWORK.prefixlen} dev eth0",
        ],
    )
    if host.rate is not None:
        # tc limits outgoing traffic: the host's end limits what it sends, the switch's end what it receives.
        _batch(host_pid, "tc", [shaping("eth0", host.rate)])
        _batch(lab_pid, "tc", [shaping(port(host), host.rate)])


def unplug(host: LabHost, lab_pid: int) -> None:
    """Remove the cable with both of its ends."""
    _batch(lab_pid, "ip", [f"link del {port(host)}"])


def port(host: LabHost) -> str:
    """Return the name of the host's port of the switch, unique in the lab and short enough for a link."""
    return "port" + host.address.rpartition(".")[2]


def hardware_address(host: LabHost) -> str:
    """Return the hardware address of a host, the same at every boot: with another one, its neighbours would
    not reach it until their ARP entries expire.
    """
    return ":".join(["02", "00", *(f"{int(part):02x}" for part in host.address.split("."))])


def shaping(device: str, rate: int) -> str:
    """Return the arguments of tc that limit the outgoing traffic of `device` to `rate` bit/s."""
    burst = max(_SMALLEST_BURST, int(rate / 8 * _BURST_S))
    return f"qdisc add dev {device} root tbf rate {rate}bit burst {burst}b latency {_QUEUE_MS}ms"


def _batch(pid: int, tool: str, lines: list[str]) -> None:
    done = subprocess.run(
        ["nsenter", f"--target={pid}", "--net", "--", tool, "-batch", "-"],
        check=False,
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    if done.returncode != 0:
        raise LabError(f"the lab's network: {done.stderr.strip() or done.stdout.strip()}")

"""Which names mean the same machine: hostfiles, schedulers and `hostname` may omit parts of the domain."""

from collections.abc import Sequence

from fedspeed.cluster.hostfile import Host


def is_same_host(name: str, other: str) -> bool:
    """Return whether two names may mean one machine.

    They are equal, or one is the other without the end of its domain. IP addresses must be equal.
    """
    shorter, longer = sorted((name.casefold(), other.casefold()), key=len)
    return shorter == longer or (longer.startswith(f"{shorter}.") and not _is_address(longer))


def matching_hosts(hosts: Sequence[Host], name: str) -> list[Host]:
    """Return the host with exactly this name, else all hosts that the name may mean."""
    exact = [host for host in hosts if host.name.casefold() == name.casefold()]
    return exact[:1] or [host for host in hosts if is_same_host(host.name, name)]


def find_host(hosts: Sequence[Host], hostname: str) -> Host | None:
    """Return the host of a job that runs on the machine called `hostname`; None if the name does not decide
    it.

    The machine is known to be one of the job's hosts. So a first label that only one host has decides too,
    whatever domain follows it: machines have different names in each of their networks.
    """
    matches = matching_hosts(hosts, hostname) or [
        host for host in hosts if _first_label(host.name) == _first_label(hostname)
    ]
    return matches[0] if len(matches) == 1 else None


def _first_label(name: str) -> str:
    return name if _is_address(name) else name.casefold().partition(".")[0]


def _is_address(name: str) -> bool:
    return name.replace(".", "").isdecimal()

"""Which names mean one machine. Hostfiles, schedulers and `hostname` differ in how much of the domain they
write.
"""

from collections.abc import Sequence

from fedspeed.cluster.hostfile import Host


def is_same_host(name: str, other: str) -> bool:
    """Whether two names may mean one machine: they are equal, or one is the other without the end of its
    domain. Addresses compare whole.
    """
    shorter, longer = sorted((name.casefold(), other.casefold()), key=len)
    return shorter == longer or (longer.startswith(f"{shorter}.") and not _is_address(longer))


def matching_hosts(hosts: Sequence[Host], name: str) -> list[Host]:
    """The host whose name this is in full, else all that it may mean."""
    exact = [host for host in hosts if host.name.casefold() == name.casefold()]
    return exact[:1] or [host for host in hosts if is_same_host(host.name, name)]


def find_host(hosts: Sequence[Host], hostname: str) -> Host | None:
    """That one of a job's hosts which calls itself `hostname`; None if its name leaves open which, or is
    another kind of name.

    One of them it must be, so a first label that only one of them has tells it too, whatever domain stands
    behind it (machines have names of their own in each of their networks).
    """
    found = matching_hosts(hosts, hostname) or [
        host for host in hosts if _first_label(host.name) == _first_label(hostname)
    ]
    return found[0] if len(found) == 1 else None


def _first_label(name: str) -> str:
    return name if _is_address(name) else name.casefold().partition(".")[0]


def _is_address(name: str) -> bool:
    return name.replace(".", "").isdecimal()

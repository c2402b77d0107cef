"""The TCP sockets on which processes listen."""

import contextlib
from collections.abc import Iterable

import psutil


def listening_sockets(pids: Iterable[int]) -> list[tuple[str, int]]:
    """Return (address, port) of every listening TCP socket of these processes, but those that have ended.

    A socket that several processes have inherited is listed once.
    """
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [
                (entry.laddr.ip, entry.laddr.port)
                for entry in psutil.Process(pid).net_connections("tcp")
                if entry.status == psutil.CONN_LISTEN
            ]
    return sorted(set(found))

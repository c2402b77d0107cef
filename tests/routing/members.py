"""Members in threads over the local transport, some of which lie, for tests of what they agree on."""

import threading

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.routing.agreed_broadcast import Group
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.transports.local import LocalTransport
from tests.limits import LIMIT_S

SOON_S = 1.0


class Liar:
    """The swap of a member that lies: `alter` is called with the number of the swap, the receiver, and what
    an honest member would send; it returns what is sent.
    """

    def __init__(self, swap, alter):
        self._swap = swap
        self._alter = alter
        self._number = -1

    def __call__(self, parts, sizes):
        self._number += 1
        altered = [self._alter(self._number, i, part) for i, part in enumerate(parts)]
        return self._swap(altered, sizes)


class Members:
    """The keys and transports of `size` members.

    Args:
        wait_s: how long a member waits for a part; `SOON_S` where one withholds something, or ends early.
    """

    def __init__(self, size: int, wait_s: float = LIMIT_S):
        self._wait_s = wait_s
        self.keys = [Ed25519PrivateKey.generate() for _ in range(size)]
        self.public = tuple(map(public_bytes, self.keys))
        self.names = tuple(f"site{i}" for i in range(size))
        self.transports = LocalTransport.set_of(size)

    def group(self, i: int, alter=None) -> Group:
        """Return the group as member i sees it. alter: of a liar, see `Liar`."""
        transport = self.transports[i]

        def swap(parts, sizes):
            return transport.swap(parts, sizes, self._wait_s)

        return Group(
            me=i,
            key=self.keys[i],
            members=self.public,
            names=self.names,
            swap=Liar(swap, alter) if alter else swap,
        )

    def play(self, act, alter=None, liar: int | None = None) -> list:
        """Return what `act(group)` returned or raised at each member, each in a thread of its own.

        Args:
            alter: of the member `liar`, see `Liar`.
        """
        return in_threads([
            lambda i=i: act(self.group(i, alter if i == liar else None)) for i in range(len(self.keys))
        ])


def in_threads(calls) -> list:
    """Return what each call returned or raised, each in a thread."""
    results: list = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return results

"""Members that delay messages to one honest member only: nobody goes on without a member that may be alive.

Else all others in the next sum could lie: without their own updates it would be the update of one member.
"""

import threading

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.anonymous.attempts import PHASES
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.anonymous.exchange import AnonymousExchange
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.transport import PeersLost
from fedspeed.routing.transports.local import LocalTransport
from tests.limits import LIMIT_S
from tests.routing.contract import in_threads
from tests.routing.sites import Sites

STEP_S = 0.5
CONFIG = RoutingConfig("mix+mask", cell_kib=4, step_deadline_s=STEP_S, deadline_s=LIMIT_S)
ANNOUNCE = PHASES.index("announce")
VICTIM = 1


class Delaying(LocalTransport):
    """The transport of a member that announces itself to everybody else first: to one honest member only
    after the others have waited for this one in vain. It goes on with the others only.
    """

    released = threading.Event()

    def send_frame(self, peer, frame, deadline_s):
        if peer != VICTIM:
            super().send_frame(peer, frame, deadline_s)
        elif frame.step == (1, ANNOUNCE):
            threading.Thread(target=self._send_later, args=(frame, deadline_s), daemon=True).start()

    def _send_later(self, frame, deadline_s):
        self.released.wait(LIMIT_S)
        super().send_frame(VICTIM, frame, deadline_s)

    def swap(self, parts, sizes, deadline_s, step=(0, 1)):
        if step[1] != ANNOUNCE:
            self._gone[VICTIM] = "its messages are ignored"
            self._crashed.add(VICTIM)
        return super().swap(parts, sizes, deadline_s, step)


def test_a_delayed_announcement_leads_no_honest_member_into_a_sum_of_liars():
    """Members 2 and 3 of four lie. Member 1 waits for their announcements, member 0 for what follows."""
    Delaying.released = threading.Event()
    kinds = [LocalTransport, LocalTransport, Delaying, Delaying]
    mailboxes = LocalTransport.set_of(4)[0]._mailboxes
    transports = [kind(i, mailboxes) for i, kind in enumerate(kinds)]
    identities = [Ed25519PrivateKey.generate() for _ in kinds]
    roster = [public_bytes(identity) for identity in identities]

    def act(transport):
        exchange = AnonymousExchange(transport, CONFIG, identities[transport.rank], roster, b"run")
        try:
            handle = exchange.start(np.ones(10, np.float32), 1.0, bounds=np.ones(1) * 40, label="update")
            return handle.wait(LIMIT_S)
        except FedSpeedError as error:
            return error
        finally:
            if transport.rank == 0:
                Delaying.released.set()

    results = in_threads(transports, act)
    assert isinstance(results[0], LostPeerError) and "connected, but did not send" in str(results[0])
    assert isinstance(results[1], LostPeerError)


def test_a_crash_is_told_from_silence(tmp_path):
    """A liar can keep a member waiting, but cannot make its process disappear."""
    transports = Sites(tmp_path, 4).all()
    leaving = threading.Barrier(2)

    def act(transport):
        if transport.rank == 1:  # ends without a message, as a killed process does
            transport.close()
        if transport.rank == 2:  # ends by itself, after an error
            transport.end_run()
            transport.close()
        if transport.rank == 3:
            leaving.wait(LIMIT_S)
        if transport.rank == 0:
            with pytest.raises(PeersLost) as lost:
                transport.swap([b"x"] * 4, [1] * 4, STEP_S, (1, 1))
            leaving.wait(LIMIT_S)
            return lost.value
        return None

    lost = in_threads(transports, act)[0]
    assert lost.peers == {1, 2, 3} and lost.ahead == {2} and lost.silent == {3}
    for transport in transports:
        transport.close()

"""Participants as threads of one process: for a single rank, for tests and for simulation."""

import queue
import time

import numpy as np

from fedspeed.routing.transport import TransportError


class LocalTransport:
    """One participant; make a whole set of them with `LocalTransport.set_of(size)`."""

    def __init__(self, rank: int, mailboxes: list[list[queue.Queue]]):
        self.rank, self.size, self.bytes_sent = rank, len(mailboxes), 0
        self._mailboxes = mailboxes  # [receiver][sender]

    @classmethod
    def set_of(cls, size: int) -> list["LocalTransport"]:
        mailboxes = [[queue.Queue() for _ in range(size)] for _ in range(size)]
        return [cls(rank, mailboxes) for rank in range(size)]

    def all_gather(self, mine, deadline_s):
        return self.all_to_all([mine] * self.size, deadline_s)

    def all_to_all(self, parts, deadline_s):
        for receiver, part in enumerate(parts):
            self._mailboxes[receiver][self.rank].put(part.copy())
            self.bytes_sent += part.nbytes if receiver != self.rank else 0
        end = time.monotonic() + deadline_s
        came = []
        for sender, box in enumerate(self._mailboxes[self.rank]):
            try:
                came.append(box.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                raise TransportError(f"participant {sender} sent nothing within {deadline_s:.0f} s") from None
        return np.stack(came)

    def close(self):
        pass

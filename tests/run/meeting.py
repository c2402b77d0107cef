"""The ranks of a job as threads of one process, for tests of what they agree on before anything is built."""

import threading

from fedspeed.cluster.discover import Launch
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import place_clients
from fedspeed.errors import FedSpeedError
from fedspeed.session.request import Job
from tests.limits import LIMIT_S


class Meeting:
    """Stand in for the store of the ranks, in one process."""

    def __init__(self):
        self._texts = {}
        self._there = threading.Condition()

    def put(self, key, text):
        with self._there:
            self._texts[key] = text
            self._there.notify_all()

    try_put = put

    def wait(self, keys, timeout_s):
        with self._there:
            self._there.wait_for(lambda: all(key in self._texts for key in keys), timeout_s)
            return {key for key in keys if key not in self._texts}

    def get(self, *keys):
        return [self._texts[key] for key in keys]


def meet(order, slots: int, function, hosts: tuple[Host, ...] = ()) -> list:
    """`function(job, store)` of all ranks, each in a thread; an exception stands for its result.

    Args:
        hosts: one with so many slots where there are none.
    """
    hosts = hosts or (Host("here", slots),)
    store = Meeting()
    found = [None] * slots

    def rank(number: int) -> None:
        launch = Launch(
            "local",
            number,
            slots,
            local_rank=number,
            hostfile=None,
            hosts=hosts,
            master_addr="127.0.0.1",
            master_port=0,
        )
        try:
            found[number] = function(Job(order, launch, place_clients(hosts, 3, "auto")), store)
        except FedSpeedError as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return found

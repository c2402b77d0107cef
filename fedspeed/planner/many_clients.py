"""Rounds of many clients: what an exchange sends and computes, by the number of participants. Pure.

Bytes are exact (a test compares them with those of the protocol); seconds are fitted to measured exchanges.
"""

from dataclasses import dataclass

RELAYS = 2  # that the cells of a masked update pass through
PHASES = 11  # of an anonymous sum with two relays, each with a message between any two participants
SUMS = 2  # of a masked round: its header and its update
MESSAGES = SUMS * PHASES + 1  # between any two participants in a round; the last one signs the round's state
# CPU-seconds of a masked exchange for each byte of the update: a constant part, and the key stream for each
# other participant. Least squares fit to the 3, 9 and 16 clients of benchmarks/results/anonymous.md.
MASK_S = 1.3e-9
STREAM_S = 0.22e-9
MESSAGE_S = 5e-5  # CPU-seconds of a message
# CPU-seconds of a masked round for each other participant, whatever is summed: signatures, key agreements and
# cells. Fitted to rounds of 4 to 64 processes that shared two cores (`python -m fedspeed bench scale`). In
# one process, without sockets, it is 3.7 ms.
MEMBER_S = 9.6e-3
CELL_WORDS = 1 << 20  # of the default routing.cell_kib
HEADER_WORDS = 1_300  # of a round's header in 32-bit integers, about
UPDATE_TAIL = 16  # integers after an update: its weight, and how many values were clipped

_SERIAL = 16
_LAYER = 48
_DIGEST = 32
_SIGNATURE = 64
_SHORT = 736  # bytes that two members send each other in the phases that do not depend on the update


@dataclass(frozen=True)
class ExchangeCost:
    """What a client does in the exchange of one round.

    Attributes:
        sent: bytes to others. link: seconds of them on its link.
        streams: CPU-seconds that grow with the update: key streams, sealing, sums.
        members: CPU-seconds that grow with the participants: messages, signatures, key agreements, cells.
    """

    sent: float
    link: float
    streams: float
    members: float

    @property
    def cpu(self) -> float:
        """Return the CPU-seconds."""
        return self.streams + self.members

    @property
    def seconds(self) -> float:
        """Return the seconds, if nothing overlaps."""
        return self.link + self.cpu


def sum_bytes(words: int, members: int) -> int:
    """Return the mean bytes that a member sends to others in one anonymous sum through two relays.

    The owner of a chunk lists the serials of all members' cells for everybody, so the bytes of a member grow
    with the square of the members (routing/anonymous/traffic.py is the exact count per pair).

    Args:
        words: 32-bit integers that each member adds. members: at least 3.
    """
    n = members
    owned = -(-words // (n * CELL_WORDS))  # chunks of each member
    core = _SERIAL + 4 * -(-words // (owned * n))
    content = core - _SERIAL
    sources = owned * (n - 1) * (core + (RELAYS + 1) * _LAYER)
    relayed = sum(owned * n * (core + layers * _LAYER) for layers in range(1, RELAYS + 1))
    lists = (n - 1) * (owned * (n * _SERIAL + _DIGEST) + _SIGNATURE) + owned * content
    return (n - 1) * _SHORT + sources + relayed + lists + (n - 1) * owned * content


def masked_cost(nbytes: int, link_rate: float, clients: int) -> ExchangeCost:
    """Return what a masked round of clients costs each of them: the sums of its header and its update.

    Args:
        nbytes: of an update in fp32. link_rate: bytes/s of a client's link.
        clients: fewer than three have no two relays, and count like three.
    """
    clients = max(clients, RELAYS + 1)
    sent = sum_bytes(nbytes // 4 + UPDATE_TAIL, clients) + sum_bytes(HEADER_WORDS, clients)
    members = clients * (MESSAGES * MESSAGE_S + MEMBER_S)
    return ExchangeCost(sent, sent / link_rate, nbytes * (MASK_S + STREAM_S * clients), members)


def plain_cost(nbytes: int, link_rate: float, clients: int) -> ExchangeCost:
    """Return what a round in the clear costs each client: parts of its update to everybody, and back."""
    sent = 2 * (clients - 1) / clients * nbytes
    return ExchangeCost(sent, sent / link_rate, 0.0, 2 * clients * MESSAGE_S)

"""A member of an attempt as far as cells are concerned: it sends its own, relays those of others, and sums
those of the chunks that it owns.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.announcement import Announcement
from fedspeed.routing.anonymous.blame import Transcript
from fedspeed.routing.anonymous.crypto import CIPHERS, DIGEST, SIGNATURE, AuthenticationError, digest
from fedspeed.routing.anonymous.lists import (
    entry_size,
    has_once,
    has_sum,
    make_entry,
    split_entries,
    sum_cores,
)
from fedspeed.routing.anonymous.masks import Masks
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.paths import PathPlan, backup_of
from fedspeed.routing.anonymous.phases import Misbehaviour, Payload, Phase, Swap
from fedspeed.routing.anonymous.statements import Statements
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.transport import as_bytes


@dataclass
class SentCell:
    """What a source keeps of a cell: its serial, and the private keys of its layers. Only the source can tell
    by these that the cell is its own.
    """

    serial: bytes
    ephemeral: list[X25519PrivateKey]


class MixNode:
    """The phases `hop 0` to `collect` of one member; `protocol.Member` plays the whole attempt.

    Attributes:
        me: this member's number. n: how many members there are.
        context: what signatures and keys are bound to: that of the parameters, and from the reveal on that of
            the parameters and the beacon.
        announced: what each member has announced; known from the first phase on.
        plan, masks: known once all have revealed; masks only where the parameters ask for them.
        integers: [length] uint32, what this member adds to the sum, in the clear.
        cells_sent: by chunk.
        received: by hop, then by chunk, the cells that have arrived here.
        orders: by (hop, chunk), the secret order in which this relay has forwarded the cells.
        sums: by chunk, the masked sum of the chunks that this member owns or is the backup of.
        entries: by chunk, what its owner has signed about it.
        statements: what members have signed in this attempt.
        complaints: chunks that did not come through as this member expects.
    """

    plan: PathPlan
    masks: Masks | None
    integers: np.ndarray
    cells_sent: list[SentCell]

    def __init__(self, parameters: PublicParameters, me: int, identity: Ed25519PrivateKey):
        """Make the onion key of this attempt.

        Args:
            identity: the private key of `parameters.members[me]`.
        """
        self.parameters = parameters
        self.me = me
        self.n = len(parameters.members)
        self.context = parameters.context
        self.cipher = CIPHERS[parameters.cipher]
        self.announced: list[Announcement] = []
        self.received: list[dict[int, list[np.ndarray]]] = []
        self.orders: dict[tuple[int, int], list[int]] = {}
        self.sums: dict[int, np.ndarray] = {}
        self.entries: dict[int, bytes] = {}
        self.complaints: set[int] = set()
        self.statements = Statements(parameters.members, self.context)
        self._reason = ""  # why this member gives up the attempt
        self._identity = identity
        self._onion = X25519PrivateKey.generate()
        self._lists_digest = b""  # of all owners' lists; empty until they have arrived

    def _sign(self, label: str, content: bytes) -> bytes:
        """Sign this member's content of a phase; return the signature."""
        return self.statements.sign(label, content, me=self.me, identity=self._identity)

    def _receive(self, label: str, member: int, content: bytes, signature: bytes, reason: str) -> None:
        """Keep what a member has signed in a phase. Raises Misbehaviour, with the reason, if it has not."""
        try:
            self.statements.receive(label, member, content, signature)
        except AuthenticationError:
            raise Misbehaviour(reason, member) from None

    @property
    def onion_keys(self) -> list[bytes]:
        """The public onion keys of all members."""
        return [announcement.onion_key for announcement in self.announced]

    # Phases "hop 0" to "hop L": from the sources through L relays to the owners.

    def _relay_cells(self) -> Phase[None]:
        """Send a cell of every chunk, and forward those of others; a relay waits for all before it sends any.

        So the order of arrival says nothing about the order of departure.
        """
        self.cells_sent = [
            SentCell(
                secrets.token_bytes(cells.SERIAL),
                [X25519PrivateKey.generate() for _ in range(self.plan.relays + 1)],
            )
            for _ in range(self.plan.chunks)
        ]
        outgoing: dict[int, Sequence[np.ndarray]] = {}
        for chunk, cell in enumerate(cells.empty_cells(self.plan, 0, self.plan.chunks)):
            self.build_cell(chunk, cell)
            outgoing[chunk] = [cell]
        for hop in range(self.plan.relays + 1):
            payloads = yield self._swap_of_hop(hop, outgoing)
            arrived = self._cells_by_chunk(hop, payloads)
            self.received.append(arrived)
            if hop < self.plan.relays:
                opened = cells.empty_cells(self.plan, hop + 1, self.n * len(arrived))
                outgoing = {
                    chunk: self.shuffled(hop, chunk, opened[i * self.n : (i + 1) * self.n])
                    for i, chunk in enumerate(arrived)
                }

    def _swap_of_hop(self, hop: int, outgoing: dict[int, Sequence[np.ndarray]]) -> Swap:
        """Return what goes out and comes in in a hop, by the path plan.

        Args:
            outgoing: cells that this member sends, by chunk.
        """
        parts: list[Payload] = [
            [cell for chunk in self.plan.chunks_between(hop, self.me, to) for cell in outgoing[chunk]]
            for to in range(self.n)
        ]
        size = self._cells_of_chunk(hop) * cells.size(self.plan, hop)
        sizes = [len(self.plan.chunks_between(hop, sender, self.me)) * size for sender in range(self.n)]
        return Swap(f"hop {hop}", parts, sizes)

    def _cells_of_chunk(self, hop: int) -> int:
        """Return how many cells of a chunk one member sends to another: its own, or those of all members."""
        return 1 if hop == 0 else self.n

    def _cells_by_chunk(self, hop: int, payloads: Sequence[Payload]) -> dict[int, list[np.ndarray]]:
        """Return the cells of each chunk: in hop 0 in the order of their sources, later as the relay sent
        them.
        """
        by_chunk: dict[int, list[np.ndarray]] = {}
        count = self._cells_of_chunk(hop)
        for sender, payload in enumerate(payloads):
            pieces = _split(payload, cells.size(self.plan, hop))
            for i, chunk in enumerate(self.plan.chunks_between(hop, sender, self.me)):
                by_chunk.setdefault(chunk, []).extend(pieces[i * count : (i + 1) * count])
        return by_chunk

    def build_cell(self, chunk: int, out: np.ndarray) -> None:
        """Build this member's cell of a chunk, masked and sealed, into `out` [size of hop 0] uint8."""
        core = cells.empty_cells(self.plan, self.plan.relays + 1, 1)[0]
        start = chunk * self.plan.chunk_length
        content = self.integers[start : start + self.plan.chunk_length]
        core[: cells.SERIAL] = np.frombuffer(self.cells_sent[chunk].serial, np.uint8)
        integers = cells.integers_of(core)
        integers[: len(content)] = content
        integers[len(content) :] = 0
        if self.masks:
            self.masks.apply(chunk, integers)
        cells.build(
            self.cipher,
            self.context,
            self.plan,
            chunk,
            self.onion_keys,
            core=core,
            ephemeral=self.cells_sent[chunk].ephemeral,
            out=out,
        )

    def open_layers(self, hop: int, chunk: int, out: np.ndarray) -> None:
        """Open the outermost layer of a chunk's cells, into `out` [n, size of the next hop] uint8.

        A cell that does not open is replaced by noise, so that the next member gets the number of bytes it
        expects; the complaint stops the attempt before anything is unmasked. (A cell that was replayed takes
        the place of another one, whose source will miss it in the list.)
        """
        for cell, inside in zip(self.received[hop][chunk], out):
            try:
                cells.open_layer(self.cipher, self.context, hop, chunk, self._onion, cell=cell, out=inside)
            except AuthenticationError:
                self.complaints.add(chunk)
                inside[:] = np.frombuffer(secrets.token_bytes(len(inside)), np.uint8)

    def shuffled(self, hop: int, chunk: int, out: np.ndarray) -> list[np.ndarray]:
        """Return a chunk's cells as this relay forwards them, opened into `out` [n, size of the next hop]."""
        self.open_layers(hop, chunk, out)
        order = self.orders.setdefault((hop, chunk), secret_order(self.n))
        return [out[i] for i in order]

    # Phase "collect": owners publish which cells they have summed.

    def _collect(self) -> Phase[None]:
        """Sum the chunks that this member owns, publish signed lists of their serials, and check the others'.

        The backup gets the masked sums with the list. Without the secrets of all self masks they tell
        nothing.
        """
        owned = self.plan.owned(self.me)
        sums = BUFFERS.take(len(owned), self.plan.chunk_length, dtype=np.uint32)
        self.sums.update(zip(owned, sums))
        cores = cells.empty_cells(self.plan, self.plan.relays + 1, self.n)
        entries = b"".join(self._sum_chunk(chunk, cores) for chunk in owned)
        message = entries + self._sign("collect", digest(entries))
        to_backup = BUFFERS.take(len(message) + sums.nbytes)
        to_backup[: len(message)] = np.frombuffer(message, np.uint8)
        to_backup[len(message) :] = sums.reshape(-1).view(np.uint8)
        backup = backup_of(self.me, self.n)
        parts: list[Payload] = [to_backup if i == backup else message for i in range(self.n)]
        list_sizes = [len(self.plan.owned(i)) * entry_size(self.n) for i in range(self.n)]
        sum_sizes = [self._backup_size(owner) for owner in range(self.n)]
        sizes = [a + SIGNATURE + b for a, b in zip(list_sizes, sum_sizes)]
        payloads = yield Swap("collect", parts, sizes)
        for owner, payload in enumerate(payloads):
            data = as_bytes(payload)
            text = data[: list_sizes[owner]].tobytes()
            signature = data[list_sizes[owner] :][:SIGNATURE].tobytes()
            self._check_list(owner, text, signature)
            if sum_sizes[owner]:
                self._store_sums(owner, data[list_sizes[owner] + SIGNATURE :])
        lists = [self.statements.content("collect", owner) or b"" for owner in range(self.n)]
        self._lists_digest = digest(b"lists", self.context, *lists)

    def _sum_chunk(self, chunk: int, cores: np.ndarray) -> bytes:
        """Open and sum the cells of a chunk that this member owns; return the chunk's entry.

        Args:
            cores: memory for them, [n, size] uint8.
        """
        self.open_layers(self.plan.relays, chunk, cores)
        if len(set(map(cells.serial_of, cores))) < self.n:
            self.complaints.add(chunk)
        return make_entry(cores, sum_cores(cores, self.sums[chunk]))

    def _backup_size(self, owner: int) -> int:
        """Return the bytes of the sums that an owner sends this member to store."""
        if backup_of(owner, self.n) != self.me:
            return 0
        return 4 * self.plan.chunk_length * len(self.plan.owned(owner))

    def _check_list(self, owner: int, text: bytes, signature: bytes) -> None:
        """Take an owner's list, and complain about chunks in which this member's cell is not listed once.

        Raises:
            Misbehaviour: the owner has not signed it.
        """
        reason = f"owner {owner} did not sign the list that it sent to member {self.me}"
        self._receive("collect", owner, digest(text), signature, reason)
        for chunk, entry in zip(self.plan.owned(owner), split_entries(text, self.n), strict=True):
            self.entries[chunk] = entry
            if not has_once(entry, self.cells_sent[chunk].serial):
                self.complaints.add(chunk)

    def _store_sums(self, owner: int, data: np.ndarray) -> None:
        """Store an owner's sums [bytes] uint8 as its backup; complain where they are not the listed ones."""
        size = 4 * self.plan.chunk_length
        for i, chunk in enumerate(self.plan.owned(owner)):
            self.sums[chunk] = data[i * size : (i + 1) * size].view(np.uint32)
            if not has_sum(self.entries[chunk], self.sums[chunk]):
                self.complaints.add(chunk)

    # Phase "blame".

    def transcript(self, chunk: int) -> Transcript:
        """Return what this member has to reveal of a chunk that was spoiled."""
        received = (bytes(DIGEST),) * self.n
        sent = received
        path = self.plan.paths[chunk]
        if self.me in path:
            hop = path.index(self.me)
            received = tuple(digest(cell.data) for cell in self.received[hop][chunk])
            opened = cells.empty_cells(self.plan, hop + 1, self.n)
            forwarded = list(opened)
            if hop < self.plan.relays:
                forwarded = self.shuffled(hop, chunk, opened)
            else:
                self.open_layers(hop, chunk, opened)
            sent = tuple(digest(cell.data) for cell in forwarded)
        cell = cells.empty_cells(self.plan, 0, 1)[0]
        self.build_cell(chunk, cell)
        ephemeral = tuple(
            key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
            for key in self.cells_sent[chunk].ephemeral
        )
        return Transcript(cell, ephemeral, received, sent)


def _split(payload: Payload, size: int) -> Sequence[np.ndarray]:
    """Return the cells in what one member sent: arrays of `size` bytes, without a copy where they lie side by
    side, or are pieces already.
    """
    if isinstance(payload, list) and all(len(piece) == size for piece in payload):
        return payload
    return list(as_bytes(payload).reshape(-1, size))


def secret_order(n: int) -> list[int]:
    """Return a permutation that nobody else can know or predict."""
    order = list(range(n))
    secrets.SystemRandom().shuffle(order)
    return order

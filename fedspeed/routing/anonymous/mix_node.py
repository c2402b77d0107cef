"""A member of an attempt as the cells see it: it builds its own, relays those of others, and adds up those it
owns.
"""

import secrets
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous import cells, paths
from fedspeed.routing.anonymous.blame import add_up, list_of
from fedspeed.routing.anonymous.crypto import CIPHERS, SIGNATURE, Refused, check_signature, digest
from fedspeed.routing.anonymous.masks import Masks
from fedspeed.routing.anonymous.parameters import HASH, PublicParameters, Steps, Suspicion, Swap
from fedspeed.routing.buffer_pool import BUFFERS


@dataclass
class Sent:
    """What a source remembers of a chunk: enough to build its cell again."""

    serial: bytes
    ephemeral: list[X25519PrivateKey]


@dataclass
class Known:
    """What everybody has been told by the end of `reveal`."""

    onion: list[bytes]
    mask: list[bytes]
    promised: list[bytes]  # digests of the secrets of own masks
    beacon: bytes = b""
    shares: dict[int, int] = field(default_factory=dict)  # what the others entrusted to this member


class Station:
    """A member as the cells see it: a source, a relay and an owner of chunks. `protocol.Member` plays it.

    Args:
        me: this member's number.
        identity: its private key, whose public part is `terms.members[me]`.
    """

    plan: paths.Plan  # this and the next three are known once all have revealed
    _known: Known
    _masks: Masks | None
    _words: np.ndarray

    def __init__(self, terms: PublicParameters, me: int, identity: Ed25519PrivateKey):
        self.terms = terms
        self.me = me
        self._identity = identity
        self.n = len(terms.members)
        self.context = terms.context
        self._cipher = CIPHERS[terms.cipher]
        self._onion = X25519PrivateKey.generate()
        self._complaints: set[int] = set()
        self._inputs: list[dict[int, list]] = []  # by level: chunk -> its cells, as they came
        self._orders: dict[tuple[int, int], list[int]] = {}  # (level, chunk) -> the secret order of its cells
        self._digest = b""  # of all lists of serials, once they are told
        self._listed: dict[int, bytes] = {}  # what owners have signed of their chunks
        # Masked sums of the chunks this member owns or keeps for another.
        self._sums: dict[int, np.ndarray] = {}

    def _hops(self) -> Steps:
        plan = self.plan
        self._sent = [
            Sent(
                secrets.token_bytes(cells.SERIAL), [X25519PrivateKey.generate() for _ in range(plan.hops + 1)]
            )
            for _ in range(plan.chunks)
        ]
        room = cells.room(plan, 0, plan.chunks)
        for chunk, cell in enumerate(room):
            self._build_own(chunk, cell)
        outgoing = {chunk: [cell] for chunk, cell in enumerate(room)}
        for level in range(plan.hops + 1):
            parts = [
                [cell for chunk in self._given(level, self.me, to) for cell in outgoing[chunk]]
                for to in range(self.n)
            ]
            size = cells.size(plan, level)
            each = 1 if level == 0 else self.n
            sizes = [len(self._given(level, sender, self.me)) * each * size for sender in range(self.n)]
            came = yield Swap(f"hop {level}", parts, sizes)
            self._inputs.append(self._sorted(level, came))
            if level < plan.hops:
                room = cells.room(plan, level + 1, self.n * len(self._inputs[level]))
                here = self._inputs[level]
                outgoing = {
                    chunk: self._mixed(level, chunk, room[i * self.n : (i + 1) * self.n])
                    for i, chunk in enumerate(here)
                }

    def _build_own(self, chunk: int, cell: np.ndarray) -> None:
        """This member's cell of a chunk, as it sends it."""
        core = cells.room(self.plan, self.plan.hops + 1, 1)[0]
        start = chunk * self.plan.chunk_words
        core[: cells.SERIAL] = np.frombuffer(self._sent[chunk].serial, np.uint8)
        own = self._words[start : start + self.plan.chunk_words]
        words = cells.words_of(core)
        words[: len(own)], words[len(own) :] = own, 0
        if self._masks:
            self._masks.apply(chunk, words)
        cells.build(
            self._cipher,
            self.context,
            self.plan,
            chunk=chunk,
            keys=self._known.onion,
            core=core,
            ephemeral=self._sent[chunk].ephemeral,
            out=cell,
        )

    def _given(self, level: int, sender: int, receiver: int) -> tuple[int, ...]:
        return self.plan.between(level, sender, receiver)

    def _sorted(self, level: int, came: list) -> dict[int, list[np.ndarray]]:
        """The cells of each chunk: by sender at level 0, afterwards as the relay before gave them."""
        size = cells.size(self.plan, level)
        found = {}
        for sender, data in enumerate(came):
            whole = isinstance(data, list) and all(len(piece) == size for piece in data)
            flat = data if whole else b"".join(data) if isinstance(data, list) else data
            pieces = data if whole else np.frombuffer(flat, np.uint8).reshape(-1, size) if len(flat) else []
            chunks = self._given(level, sender, self.me)
            each = 1 if level == 0 else self.n
            for i, chunk in enumerate(chunks):
                found.setdefault(chunk, []).extend(pieces[i * each : (i + 1) * each])
        return found

    def _open(self, level: int, chunk: int, out: np.ndarray) -> None:
        """What is in the cells of a chunk, into `out` [n, size of the next level]. One that does not open is
        replaced by noise, so that the next station gets its number; the complaint stops the attempt before
        anything is unmasked. (One that came twice pushes out another, whose source will miss it.)
        """
        for cell, inside in zip(self._inputs[level][chunk], out):
            try:
                cells.peel(
                    self._cipher, self.context, level, chunk=chunk, private=self._onion, cell=cell, out=inside
                )
            except Refused:
                self._complaints.add(chunk)
                inside[:] = np.frombuffer(secrets.token_bytes(len(inside)), np.uint8)

    def _mixed(self, level: int, chunk: int, room: np.ndarray) -> list[np.ndarray]:
        """A chunk's cells as this relay passes them on, opened into `room` [n, size of the next level]."""
        self._open(level, chunk, room)
        return [room[i] for i in self._orders.setdefault((level, chunk), secret_order(self.n))]

    def _collect(self) -> Steps:
        owned = self.plan.owned(self.me)
        heir = paths.backup_of(self.me, self.n)
        kept = BUFFERS.take(len(owned), self.plan.chunk_words, dtype=np.uint32)
        self._sums.update(zip(owned, kept))
        room = cells.room(self.plan, self.plan.hops + 1, self.n)
        listed = b"".join(self._list_of(chunk, room) for chunk in owned)
        body = listed + self._identity.sign(digest(b"collect", self.context, listed))
        with_sums = BUFFERS.take(len(body) + kept.nbytes)
        with_sums[: len(body)], with_sums[len(body) :] = (
            np.frombuffer(body, np.uint8),
            kept.reshape(-1).view(np.uint8),
        )
        parts = [with_sums if i == heir else body for i in range(self.n)]
        entry = self.n * cells.SERIAL + HASH
        lists = [len(self.plan.owned(owner)) * entry for owner in range(self.n)]
        sums = [
            4 * self.plan.chunk_words * len(self.plan.owned(owner))
            if paths.backup_of(owner, self.n) == self.me
            else 0
            for owner in range(self.n)
        ]
        came = yield Swap("collect", parts, [a + SIGNATURE + b for a, b in zip(lists, sums)])
        texts = []
        for owner, data in enumerate(came):
            text = bytes(data[: lists[owner]])
            signature = bytes(data[lists[owner] : lists[owner] + SIGNATURE])
            try:
                check_signature(self.terms.members[owner], signature, digest(b"collect", self.context, text))
            except Refused:
                raise Suspicion(
                    f"owner {owner} did not sign the list that it sent to member {self.me}", owner
                ) from None
            texts.append(text)
            self._listed.update(
                (chunk, text[i * entry : (i + 1) * entry]) for i, chunk in enumerate(self.plan.owned(owner))
            )
            self._check_lists(owner, text, entry)
            if sums[owner]:
                self._keep(owner, text, entry, data[lists[owner] + SIGNATURE :])
        self._lists = [digest(text) for text in texts]
        self._digest = digest(b"lists", self.context, *self._lists)

    def _list_of(self, chunk: int, cores: np.ndarray) -> bytes:
        """What this owner says of a chunk; makes the sum of its cells, whose cores [n, size] it leaves in
        `cores`.
        """
        self._open(self.plan.hops, chunk, cores)
        if len({core[: cells.SERIAL].tobytes() for core in cores}) < self.n:
            self._complaints.add(chunk)
        return list_of(cores, add_up(cores, self._sums[chunk]))

    def _check_lists(self, owner: int, text: bytes, entry: int) -> None:
        for i, chunk in enumerate(self.plan.owned(owner)):
            serials = text[i * entry : (i + 1) * entry - HASH]
            listed = [serials[at : at + cells.SERIAL] for at in range(0, len(serials), cells.SERIAL)]
            if listed.count(self._sent[chunk].serial) != 1:
                self._complaints.add(chunk)

    def _keep(self, owner: int, text: bytes, entry: int, sums) -> None:
        """Take an owner's sums into keeping."""
        width = self.plan.chunk_words
        for i, chunk in enumerate(self.plan.owned(owner)):
            self._sums[chunk] = np.frombuffer(sums, np.uint32, width, 4 * width * i)
            if digest(self._sums[chunk].view(np.uint8)) != text[(i + 1) * entry - HASH : (i + 1) * entry]:
                self._complaints.add(chunk)


def secret_order(n: int) -> list[int]:
    """A permutation that nobody else can know or predict."""
    order = list(range(n))
    secrets.SystemRandom().shuffle(order)
    return order

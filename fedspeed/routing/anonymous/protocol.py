"""One attempt at an anonymous sum, as a member plays it: a generator that yields what is to be exchanged and is sent what came. Pure but for
randomness: it knows neither sockets nor clocks, so that any number of members can be played in one process, and any message changed on its way.

    announce   fresh keys, signed; a commitment to a part of the beacon
    reveal     that part; shares of the secret of the own mask, one sealed to each member
    hop 0..L   the cells, from their sources through L relays to the owners. A relay waits for all cells before it sends any
    collect    owners list the serials they have, and the digests of their sums; a backup gets the sums
    vote       each member says whether its own cells are in the lists, once each, and that all were told the same lists
    confirm    each member signs the lists. All signatures together commit the set; nothing before this is of any use to anyone
    unmask     the secrets of the own masks
    sums       owners give the sums to all
    done       nobody leaves before all have them

The certificate is what makes "committed" the same for everybody: where a member is lost, the others ask each other for one (`settle`), and either all
go on with the set that it commits, or all begin another attempt with fresh masks.
"""

import itertools
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous import cells, crypto, paths, ring, shamir
from fedspeed.routing.anonymous.blame import Testimony, add_up, judge, list_of
from fedspeed.routing.anonymous.crypto import CIPHERS, KEY, SIGNATURE, TAG, Refused, agree, check_signature, derive, digest, open_sealed, public_of, seal
from fedspeed.routing.anonymous.masks import Masks, remove_own, remove_own_scalars
from fedspeed.routing.rooms import ROOMS

NO_CHUNK = 2**32 - 1
_HASH = 32
_REBUILDS = 256  # sets of shares to try
_DISAGREEMENTS = 2  # rounds of settling in which members may differ about who is lost: word of a death takes one


@dataclass(frozen=True)
class Terms:
    """What the members of an attempt agree on beforehand; an attempt in which they do not fails at its first message.

    Attributes:
        members: identity keys (Ed25519, 32 bytes) in the order of the roster.
        words: ring elements of everyone's vector.
        settings: digest of everything that must be equal on all sites: roster, base, tokenizer, run.
        attempt: its number in the run, the retries of an exchange counted too.
        masked: whether words are masked; else owners see a member's chunk, without its name.
        hops: relays of a path; 0: cells go to the owner directly, who sees from whom.
        threshold: how many must survive; so many together can tell a lost member's mask.
    """

    members: tuple[bytes, ...]
    words: int
    settings: bytes
    attempt: int = 0
    masked: bool = True
    hops: int = 2
    chunk_words: int = 1 << 18
    cipher: str = "aes-128-gcm"
    threshold: int = 2

    @property
    def context(self) -> bytes:
        parts = (self.words, self.attempt, self.masked, self.hops, self.chunk_words, self.cipher, self.threshold)
        return digest(b"fedspeed sum", self.settings, repr(parts).encode(), *self.members)


@dataclass
class Swap:
    """Give `parts[i]` to member i: bytes, or a list of pieces of one size, which may come as such a list too. `sizes[i]` bytes will come from it. One
    that is lost gets and gives nothing."""

    state: str
    parts: list
    sizes: list[int]


@dataclass(frozen=True)
class Agreed:
    """The sum of all members' words [words] uint32, modulo 2^32, and whose they are."""

    words: np.ndarray
    members: tuple[bytes, ...]


class Lost(Exception):
    """Thrown into the generator instead of what it waits for, once everyone else has been heard.

    Attributes:
        members: those that no longer answer, by number.
        settling: whether somebody who does is settling already.
    """

    def __init__(self, members: frozenset[int], settling: bool = False):
        super().__init__(f"lost: {sorted(members)}")
        self.members, self.settling = members, settling


class Void(Exception):
    """The attempt has failed, and nothing of it can be used.

    Attributes:
        lost: members that are gone. blamed: sets of members, each of which has one at fault in it; a set of one is a proof.
        fatal: whether another attempt is useless.
    """

    def __init__(self, reason: str, lost: frozenset[int] = frozenset(), blamed: Sequence[frozenset[int]] = (), fatal: bool = False):
        super().__init__(reason)
        self.lost, self.blamed, self.fatal = lost, tuple(blamed), fatal


class _Suspicion(Exception):
    """What members did wrong in messages to this one; nobody else has seen it."""

    def __init__(self, reason: str, *members: int):
        super().__init__(reason)
        self.members = frozenset(members)


Steps = Generator[Swap, list, "Agreed"]


@dataclass
class _Sent:
    """What a source remembers of a chunk: enough to build its cell again."""

    serial: bytes
    ephemeral: list[X25519PrivateKey]


@dataclass
class _Known:
    """What everybody has been told by the end of `reveal`."""

    onion: list[bytes]
    mask: list[bytes]
    promised: list[bytes]  # digests of the secrets of own masks
    beacon: bytes = b""
    shares: dict[int, int] = field(default_factory=dict)  # what the others entrusted to this member


class Member:
    """Args:
        me: this member's number.
        payload: gives this member's words [words] uint32.
    """

    def __init__(self, terms: Terms, me: int, identity: Ed25519PrivateKey, payload: Callable[[], np.ndarray]):
        self.terms, self.me, self._identity, self._payload = terms, me, identity, payload
        self.n, self.context, self._cipher = len(terms.members), terms.context, CIPHERS[terms.cipher]
        self._onion, self._mask = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._own, self._nonce = shamir.to_bytes(shamir.draw()), secrets.token_bytes(KEY)
        self._lost: frozenset[int] = frozenset()
        self._complaints: set[int] = set()
        self._inputs: list[dict[int, list]] = []  # by level: chunk -> its cells, as they came
        self._orders: dict[tuple[int, int], list[int]] = {}  # (level, chunk) -> the secret order of its cells
        self._signatures: list[bytes] | None = None  # the certificate
        self._digest = b""  # of all lists of serials, once they are told
        self._listed: dict[int, bytes] = {}  # what owners have signed of their chunks
        self._sums: dict[int, np.ndarray] = {}  # masked sums of the chunks this member owns or keeps for another
        self._suspected: frozenset[int] = frozenset()  # of having done wrong in a message to this member
        self._either: list[frozenset[int]] = []  # sets with one at fault in each, as far as only this member can tell
        self._reason = ""
        self.state = "begin"

    def run(self) -> Steps:
        """Play the attempt. Raises: Void."""
        try:
            yield from self._until_committed()
            try:
                return (yield from self._finish())
            except Lost as lost:
                self._lost |= lost.members
        except Lost as lost:
            self._lost |= lost.members
        except _Suspicion as suspicion:  # the others know nothing of it, and would take this member for lost if it just left
            self._suspected, self._reason = suspicion.members - {self.me}, str(suspicion)
        for _ in range(2 * self.n):
            try:
                yield from self._settle()
                return (yield from self._finish())
            except Lost as lost:
                self._lost |= lost.members
        raise Void("the members cannot settle who is lost", self._lost, fatal=True)

    def _until_committed(self) -> Steps:
        yield from self._announce()
        yield from self._reveal()
        words = self._payload()
        assert words.dtype == np.uint32 and len(words) == self.terms.words
        self._words = words
        yield from self._hops()
        yield from self._collect()
        yield from self._vote()
        yield from self._confirm()

    # Keys and the beacon.

    def _announce(self) -> Steps:
        body = public_of(self._onion) + public_of(self._mask) + digest(b"nonce", self._nonce) + digest(b"own", self._own)
        message = body + self._identity.sign(digest(b"announce", self.context, body))
        came = yield self._same("announce", message)
        for i, text in enumerate(came):
            body, signature = bytes(text[:-SIGNATURE]), bytes(text[-SIGNATURE:])
            try:
                check_signature(self.terms.members[i], signature, digest(b"announce", self.context, body))
            except Refused:
                raise _Suspicion(f"member {i} announced itself with other settings, another roster, or a key that is not its own", i) from None
            for at in (0, KEY):
                try:
                    agree(self._onion, body[at:at + KEY])
                except Refused:
                    raise _Suspicion(f"member {i} announced a key that agrees on nothing", i) from None
        columns = [[bytes(text[at:at + KEY]) for text in came] for at in range(0, 4 * KEY, KEY)]
        self._known = _Known(columns[0], columns[1], columns[3])
        self._committed = columns[2]

    def _reveal(self) -> Steps:
        shares = shamir.split(shamir.from_bytes(self._own), self.n, self.terms.threshold)
        parts = [self._nonce + seal(self._cipher, self._share_key(self.me, i), shamir.to_bytes(shares[i]), self.context) for i in range(self.n)]
        came = yield Swap("reveal", parts, [len(part) for part in parts])
        for i, text in enumerate(came):
            if digest(b"nonce", bytes(text[:KEY])) != self._committed[i]:
                raise _Suspicion(f"member {i} revealed another part of the beacon than it had committed to", i)
            try:
                share = open_sealed(self._cipher, self._share_key(i, self.me), bytes(text[KEY:]), self.context)
            except Refused:
                raise _Suspicion(f"the share that member {i} sent to member {self.me} does not open", i) from None
            self._known.shares[i] = shamir.from_bytes(share)
        self._known.beacon = digest(b"beacon", self.context, *(bytes(text[:KEY]) for text in came))
        self.context = digest(self.context, self._known.beacon)  # all that follows belongs to this beacon
        self.plan = paths.draw(self._known.beacon, self.n, self.terms.words, self.terms.hops, self.terms.chunk_words)
        self._masks = Masks(self._cipher, self.context, self.me, self._mask, self._known.mask, self._own) if self.terms.masked else None

    def _share_key(self, giver: int, holder: int) -> bytes:
        other = holder if giver == self.me else giver
        secret = agree(self._mask, self._known.mask[other])
        return derive(secret, b"share", self.terms.context, giver.to_bytes(4, "big"), holder.to_bytes(4, "big"))

    # The way of the cells.

    def _hops(self) -> Steps:
        plan = self.plan
        self._sent = [_Sent(secrets.token_bytes(cells.SERIAL), [X25519PrivateKey.generate() for _ in range(plan.hops + 1)])
                      for _ in range(plan.chunks)]
        room = cells.room(plan, 0, plan.chunks)
        for chunk, cell in enumerate(room):
            self._build_own(chunk, cell)
        outgoing = {chunk: [cell] for chunk, cell in enumerate(room)}
        for level in range(plan.hops + 1):
            parts = [[cell for chunk in self._given(level, self.me, to) for cell in outgoing[chunk]] for to in range(self.n)]
            size = cells.size(plan, level)
            each = 1 if level == 0 else self.n
            sizes = [len(self._given(level, sender, self.me)) * each * size for sender in range(self.n)]
            came = yield Swap(f"hop {level}", parts, sizes)
            self._inputs.append(self._sorted(level, came))
            if level < plan.hops:
                room, here = cells.room(plan, level + 1, self.n * len(self._inputs[level])), self._inputs[level]
                outgoing = {chunk: self._mixed(level, chunk, room[i * self.n:(i + 1) * self.n]) for i, chunk in enumerate(here)}

    def _build_own(self, chunk: int, cell: np.ndarray) -> None:
        """This member's cell of a chunk, as it sends it."""
        core, start = cells.room(self.plan, self.plan.hops + 1, 1)[0], chunk * self.plan.chunk_words
        core[:cells.SERIAL] = np.frombuffer(self._sent[chunk].serial, np.uint8)
        own, words = self._words[start:start + self.plan.chunk_words], cells.words_of(core)
        words[:len(own)], words[len(own):] = own, 0
        if self._masks:
            self._masks.apply(chunk, words)
        cells.build(self._cipher, self.context, self.plan, chunk, self._known.onion, core, self._sent[chunk].ephemeral, cell)

    def _given(self, level: int, sender: int, receiver: int) -> tuple[int, ...]:
        return self.plan.between(level, sender, receiver)

    def _sorted(self, level: int, came: list) -> dict[int, list[np.ndarray]]:
        """The cells of each chunk: by sender at level 0, afterwards as the relay before gave them."""
        size, found = cells.size(self.plan, level), {}
        for sender, data in enumerate(came):
            whole = isinstance(data, list) and all(len(piece) == size for piece in data)
            flat = data if whole else b"".join(data) if isinstance(data, list) else data
            pieces = data if whole else np.frombuffer(flat, np.uint8).reshape(-1, size) if len(flat) else []
            chunks = self._given(level, sender, self.me)
            each = 1 if level == 0 else self.n
            for i, chunk in enumerate(chunks):
                found.setdefault(chunk, []).extend(pieces[i * each:(i + 1) * each])
        return found

    def _open(self, level: int, chunk: int, out: np.ndarray) -> None:
        """What is in the cells of a chunk, into `out` [n, size of the next level]. One that does not open is replaced by noise, so that the next station
        gets its number; the complaint stops the attempt before anything is unmasked. (One that came twice pushes out another, whose source will miss it.)"""
        for cell, inside in zip(self._inputs[level][chunk], out):
            try:
                cells.peel(self._cipher, self.context, level, chunk, self._onion, cell, inside)
            except Refused:
                self._complaints.add(chunk)
                inside[:] = np.frombuffer(secrets.token_bytes(len(inside)), np.uint8)

    def _mixed(self, level: int, chunk: int, room: np.ndarray) -> list[np.ndarray]:
        """A chunk's cells as this relay passes them on, opened into `room` [n, size of the next level]."""
        self._open(level, chunk, room)
        return [room[i] for i in self._orders.setdefault((level, chunk), secret_order(self.n))]

    # What the owners have.

    def _collect(self) -> Steps:
        owned, heir = self.plan.owned(self.me), paths.backup_of(self.me, self.n)
        kept = ROOMS.take(len(owned), self.plan.chunk_words, dtype=np.uint32)
        self._sums.update(zip(owned, kept))
        room = cells.room(self.plan, self.plan.hops + 1, self.n)
        listed = b"".join(self._list_of(chunk, room) for chunk in owned)
        body = listed + self._identity.sign(digest(b"collect", self.context, listed))
        with_sums = ROOMS.take(len(body) + kept.nbytes)
        with_sums[:len(body)], with_sums[len(body):] = np.frombuffer(body, np.uint8), kept.reshape(-1).view(np.uint8)
        parts = [with_sums if i == heir else body for i in range(self.n)]
        entry = self.n * cells.SERIAL + _HASH
        lists = [len(self.plan.owned(owner)) * entry for owner in range(self.n)]
        sums = [4 * self.plan.chunk_words * len(self.plan.owned(owner)) if paths.backup_of(owner, self.n) == self.me else 0 for owner in range(self.n)]
        came = yield Swap("collect", parts, [a + SIGNATURE + b for a, b in zip(lists, sums)])
        texts = []
        for owner, data in enumerate(came):
            text, signature = bytes(data[:lists[owner]]), bytes(data[lists[owner]:lists[owner] + SIGNATURE])
            try:
                check_signature(self.terms.members[owner], signature, digest(b"collect", self.context, text))
            except Refused:
                raise _Suspicion(f"owner {owner} did not sign the list that it sent to member {self.me}", owner) from None
            texts.append(text)
            self._listed.update((chunk, text[i * entry:(i + 1) * entry]) for i, chunk in enumerate(self.plan.owned(owner)))
            self._check_lists(owner, text, entry)
            if sums[owner]:
                self._keep(owner, text, entry, data[lists[owner] + SIGNATURE:])
        self._lists = [digest(text) for text in texts]
        self._digest = digest(b"lists", self.context, *self._lists)

    def _list_of(self, chunk: int, cores: np.ndarray) -> bytes:
        """What this owner says of a chunk; makes the sum of its cells, whose cores [n, size] it leaves in `cores`."""
        self._open(self.plan.hops, chunk, cores)
        if len({core[:cells.SERIAL].tobytes() for core in cores}) < self.n:
            self._complaints.add(chunk)
        return list_of(cores, add_up(cores, self._sums[chunk]))

    def _check_lists(self, owner: int, text: bytes, entry: int) -> None:
        for i, chunk in enumerate(self.plan.owned(owner)):
            serials = text[i * entry:(i + 1) * entry - _HASH]
            listed = [serials[at:at + cells.SERIAL] for at in range(0, len(serials), cells.SERIAL)]
            if listed.count(self._sent[chunk].serial) != 1:
                self._complaints.add(chunk)

    def _keep(self, owner: int, text: bytes, entry: int, sums) -> None:
        """Take an owner's sums into keeping."""
        width = self.plan.chunk_words
        for i, chunk in enumerate(self.plan.owned(owner)):
            self._sums[chunk] = np.frombuffer(sums, np.uint32, width, 4 * width * i)
            if digest(self._sums[chunk].view(np.uint8)) != text[(i + 1) * entry - _HASH:(i + 1) * entry]:
                self._complaints.add(chunk)

    # The commitment.

    def _vote(self) -> Steps:
        """Whether anybody has a complaint, before anybody signs: so one that complains to some only keeps all from committing."""
        complaint = min(self._complaints, default=NO_CHUNK)
        came = yield self._same("vote", self._digest + b"".join(self._lists) + complaint.to_bytes(4, "big"))
        texts = [bytes(text) for text in came]
        differing = {i for i, text in enumerate(texts) if text[:_HASH] != self._digest}
        if differing:
            i = min(differing)
            owner = next((o for o in range(self.n) if texts[i][_HASH * (1 + o):_HASH * (2 + o)] != self._lists[o]), self.me)
            self._either = [frozenset({owner, i})]  # which of them, all cannot tell alike
            raise _Suspicion(f"owner {owner} told members {i} and {self.me} different lists, or one of them says so")
        complaints = {i: int.from_bytes(text[-4:], "big") for i, text in enumerate(texts)}
        chunk = min((c for c in complaints.values() if c < self.plan.chunks), default=NO_CHUNK)
        if chunk != NO_CHUNK:
            yield from self._testify(chunk, frozenset(i for i, c in complaints.items() if c == chunk))

    def _confirm(self) -> Steps:
        scalar = self._masks.scalar(ring.check_word(self._words, self._factors())) if self._masks else 0
        came = yield self._same("confirm", scalar.to_bytes(8, "big") + self._identity.sign(self._confirmed(scalar)))
        texts = [bytes(text) for text in came]
        self._adopt([text[8:] for text in texts], [int.from_bytes(text[:8], "big") for text in texts], whose=True)

    def _confirmed(self, scalar: int) -> bytes:
        return digest(b"confirm", self.context, self._digest, scalar.to_bytes(8, "big"))

    def _adopt(self, signatures: list[bytes], scalars: list[int], whose: bool = False) -> bool:
        """Take signatures for the certificate, if all of them hold."""
        for i, (signature, scalar) in enumerate(zip(signatures, scalars)):
            try:
                check_signature(self.terms.members[i], signature, self._confirmed(scalar))
            except Refused:
                if whose:
                    raise _Suspicion(f"member {i} did not sign what it confirmed", i) from None
                return False
        self._signatures, self._scalars = signatures, scalars
        return True

    def _factors(self) -> ring.Stream:
        """Random factors of the check, that nobody could know before the lists were told."""
        seed, part = derive(self._digest, b"factors"), iter(range(2**32))
        return lambda out: crypto.stream(self._cipher, seed, next(part), out)

    def _testify(self, chunk: int, accusers: frozenset[int]) -> Steps:
        """All tell what they know of one chunk of this attempt, which is void. Masked, it says nothing about anybody's words."""
        if not self.terms.masked:
            raise Void(f"chunk {chunk} did not come through the members {self.plan.stations[chunk]} as it was sent; without masks, looking for "
                       "who did it would show whose it was", blamed=[frozenset(self.plan.stations[chunk]) | accusers])
        own = Testimony.of(self, chunk)
        came = yield self._same("testify", own.pack())
        stories = [Testimony.unpack(bytes(text), self.plan, self.n) for text in came]
        blamed = judge(self._cipher, self.context, self.plan, chunk, self._known.onion, stories, self._listed[chunk], accusers)
        names = "; ".join(" or ".join(f"member {i}" for i in sorted(group)) for group in blamed)
        raise Void(f"chunk {chunk} did not come through as it was sent, by the doing of {names}", blamed=blamed)

    # After the commitment.

    def _finish(self) -> Steps:
        """The sum. Whoever is lost by now stays in it."""
        told = yield from self._tell_secrets()
        duties, width = self._duties(), 4 * self.plan.chunk_words
        mine = ROOMS.take(len(duties), self.plan.chunk_words, dtype=np.uint32)
        for chunk, words in zip(duties, mine):
            words[:] = self._sums[chunk]
            remove_own(self._cipher, told, chunk, words)
        came = yield self._same("sums", mine.reshape(-1).view(np.uint8), [width * len(self._duties(i)) for i in range(self.n)])
        total = ROOMS.take(self.plan.chunks * self.plan.chunk_words, dtype=np.uint32)
        for i, data in enumerate(came):
            for at, chunk in enumerate(self._duties(i)):
                total[chunk * self.plan.chunk_words:(chunk + 1) * self.plan.chunk_words] = np.frombuffer(data, np.uint32, self.plan.chunk_words, at * width)
        if self._masks and remove_own_scalars(told, sum(self._scalars)) != ring.check_word(total[:self.terms.words], self._factors()):
            raise Void("the sums that the owners gave are not those of what was sent", fatal=True)
        yield from self._leave("done")
        return Agreed(total[:self.terms.words], self.terms.members)

    def _duties(self, member: int | None = None) -> list[int]:
        """Chunks whose sums a member gives to the others: its own, and those of a lost member that it keeps."""
        member = self.me if member is None else member
        if member in self._lost:
            return []
        heirs = [owner for owner in self._lost if paths.backup_of(owner, self.n) == member]
        return sorted(chunk for owner in (member, *heirs) for chunk in self.plan.owned(owner))

    def _tell_secrets(self) -> Steps:
        """Everyone's own-mask secrets: told, or rebuilt for those who are lost."""
        if not self.terms.masked:
            return {}
        shares = b"".join(shamir.to_bytes(self._known.shares[i] if i in self._lost else 0) for i in range(self.n))
        came = yield self._same("unmask", self._own + shares)
        told = {i: bytes(text[:KEY]) for i, text in enumerate(came) if i not in self._lost}
        for lost in self._lost:
            at = KEY * (1 + lost)
            shares = {i: shamir.from_bytes(bytes(text[at:at + KEY])) for i, text in enumerate(came) if i not in self._lost}
            told[lost] = self._rebuilt(shares, self._known.promised[lost])
        for i in (i for i, secret in told.items() if digest(b"own", secret) != self._known.promised[i]):
            if i in self._lost:
                raise Void(f"the shares of member {i}'s secret do not fit together: somebody told another one than it was given", fatal=True)
            raise Lost(frozenset({i}))  # the others hold shares of the one it had promised
        return told

    def _rebuilt(self, shares: dict[int, int], promised: bytes) -> bytes:
        """The secret that is as promised, from whichever shares give it: one false share spoils only the sets it is in."""
        secret = b""
        for some in itertools.islice(itertools.combinations(shares.items(), self.terms.threshold), _REBUILDS):
            secret = shamir.to_bytes(shamir.rebuild(dict(some)))
            if digest(b"own", secret) == promised:
                break
        return secret

    # Where members were lost.

    def _settle(self) -> Steps:
        """The survivors agree on who is lost, and on whether the set was committed. Raises: Void where it was not.

        Nobody is lost because somebody says so: each waits for it, and hears nothing. Where members still differ after that, `outvoted` decides.
        """
        for attempt in itertools.count():
            if self.n - len(self._lost) < self.terms.threshold:
                raise Void(f"only {self.n - len(self._lost)} of {self.n} members are left, {self.terms.threshold} are needed", self._lost, fatal=True)
            before, agreed = self._lost, True
            lost, suspects = pack_members(before), pack_members(self._suspected)
            empty = bytes((SIGNATURE + 8) * self.n)
            certificate = b"".join(s + v.to_bytes(8, "big") for s, v in zip(self._signatures, self._scalars)) if self._signatures else empty
            came = yield self._same("settle", lost + suspects + certificate)
            accused: dict[int, set[int]] = {}
            claims: dict[int, frozenset[int]] = {}
            for i, text in enumerate(came):
                if i in before:
                    continue
                agreed = agreed and bytes(text[:_HASH]) == lost
                claims[i] = unpack_members(bytes(text[:_HASH]), self.n)
                for j in unpack_members(bytes(text[_HASH:2 * _HASH]), self.n):
                    accused.setdefault(j, set()).add(i)
                records = [bytes(text[at:at + SIGNATURE + 8]) for at in range(2 * _HASH, len(text), SIGNATURE + 8)]
                if not self._signatures and any(records[0]) and self._digest:
                    self._adopt([r[:SIGNATURE] for r in records], [int.from_bytes(r[SIGNATURE:], "big") for r in records])
            if agreed:
                break
            if attempt >= _DISAGREEMENTS - 1:
                self._lost |= outvoted(claims)
                if self.me in self._lost:
                    raise Void("the others take this member for lost", self._lost - {self.me}, fatal=True)
        if self._signatures is None:
            yield from self._leave("void")
            raise Void(self._reason or ("members were lost before the sum was settled" if self._lost else "a member has given up the attempt"), self._lost,
                       [*suspicions(accused, self.n - len(self._lost)), *self._either])
        orphans = [owner for owner in self._lost if paths.backup_of(owner, self.n) in self._lost]
        if orphans:
            raise Void(f"members {orphans[0]} and {paths.backup_of(orphans[0], self.n)}, who both kept the same sums, are lost", self._lost, fatal=True)

    def _leave(self, state: str) -> Steps:
        """Nobody ends before all know how it ends. One that is lost here has no say in it any more."""
        try:
            yield self._same(state, b"!")
        except Lost as lost:
            if lost.settling:
                raise

    def _same(self, state: str, message, sizes: list[int] | None = None) -> Swap:
        """The same message to all; those who are lost are left out."""
        sizes = sizes or [len(message)] * self.n
        return Swap(state, [b"" if i in self._lost else message for i in range(self.n)], [0 if i in self._lost else sizes[i] for i in range(self.n)])


def pack_members(numbers: frozenset[int]) -> bytes:
    """Numbers below 256 as a bit each."""
    return sum(1 << i for i in numbers).to_bytes(_HASH, "big")


def unpack_members(text: bytes, n: int) -> frozenset[int]:
    bits = int.from_bytes(text, "big")
    return frozenset(i for i in range(n) if bits >> i & 1)


def outvoted(claims: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """Who is lost where members differ: one whom more than half of the others cannot hear; else both it and those who say so, for nobody can tell which of
    them is at fault. So colluders have no more of the others left out than of themselves, unless they are more than half.

    Args:
        claims: by member that speaks, whom it takes for lost.
    """
    lost: set[int] = set()
    for j in sorted(set().union(*claims.values())):
        believers = {i for i, claim in claims.items() if j in claim and i != j}
        others = claims.keys() - {j}
        lost |= {j} if 2 * len(believers) > len(others) else {j, *believers}
    return frozenset(lost)


def suspicions(accused: dict[int, set[int]], present: int) -> list[frozenset[int]]:
    """Who has one at fault in it: a member that all others accuse, and not just one other, alone; else accuser and accused.

    Args:
        accused: by member, who accuses it. present: members that are left.
    """
    alone = {j for j, accusers in accused.items() if len(accusers - {j}) == present - 1 > 1}
    pairs = {frozenset({i, j}) for j, accusers in accused.items() for i in accusers if not {i, j} & alone}
    return [*(frozenset({j}) for j in sorted(alone)), *sorted(pairs, key=sorted)]


def secret_order(n: int) -> list[int]:
    """A permutation that nobody else can know or predict."""
    order = list(range(n))
    secrets.SystemRandom().shuffle(order)
    return order


def traffic(terms: Terms, plan: paths.Plan) -> dict[str, np.ndarray]:
    """[members, members] bytes from row to column in every state of an attempt without losses: a function of public facts only."""
    n, entry = len(terms.members), len(terms.members) * cells.SERIAL + _HASH
    ones, found = np.ones((n, n), np.int64), {}
    found["announce"] = ones * (4 * KEY + SIGNATURE)
    found["reveal"] = ones * (KEY + KEY + TAG)
    for level in range(plan.hops + 1):
        each = 1 if level == 0 else n
        found[f"hop {level}"] = np.array([[len(plan.between(level, s, r)) * each * cells.size(plan, level) for r in range(n)] for s in range(n)])
    owned = np.array([len(plan.owned(i)) for i in range(n)])
    found["collect"] = ones * (owned * entry + SIGNATURE)[:, None]
    for i in range(n):
        found["collect"][i, paths.backup_of(i, n)] += 4 * plan.chunk_words * owned[i]
    found["vote"] = ones * (_HASH * (1 + n) + 4)
    found["confirm"] = ones * (8 + SIGNATURE)
    if terms.masked:
        found["unmask"] = ones * KEY * (1 + n)
    found["sums"] = ones * (4 * plan.chunk_words * owned)[:, None]
    found["done"] = ones
    return found

"""One attempt at an anonymous sum, as a member plays it: a generator that yields what is to be exchanged and
is sent what came. Pure but for randomness: it knows neither sockets nor clocks, so that any number of members
can be played in one process, and any message changed on its way.

    announce   fresh keys, signed; a commitment to a part of the beacon
    reveal     that part; shares of the secret of the own mask, one sealed to each member
    hop 0..L   the cells, from their sources through L relays to the owners. A relay waits for all cells
               before it sends any
    collect    owners list the serials they have, and the digests of their sums; a backup gets the sums
    vote       each member says whether its own cells are in the lists, once each, and that all were told the
               same lists
    confirm    each member signs the lists. All signatures together commit the set; nothing before this is of
               any use to anyone
    unmask     the secrets of the own masks
    sums       owners give the sums to all
    done       nobody leaves before all have them

The certificate is what makes "committed" the same for everybody: where a member is lost, the others ask each
other for one (`settle`), and either all go on with the set that it commits, or all begin another attempt with
fresh masks.
"""

import itertools
import secrets
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous import crypto, paths, ring, shamir
from fedspeed.routing.anonymous.blame import Testimony, judge
from fedspeed.routing.anonymous.crypto import (
    KEY,
    SIGNATURE,
    Refused,
    agree,
    check_signature,
    derive_key,
    digest,
    open_sealed,
    public_bytes,
    seal,
)
from fedspeed.routing.anonymous.masks import Masks, remove_own, remove_own_scalars
from fedspeed.routing.anonymous.mix_node import Known, Station
from fedspeed.routing.anonymous.parameters import (
    HASH,
    NO_CHUNK,
    Agreed,
    Lost,
    PublicParameters,
    Steps,
    Suspicion,
    Swap,
    Void,
)
from fedspeed.routing.anonymous.recovery import outvoted, pack_members, suspicions, unpack_members
from fedspeed.routing.buffer_pool import BUFFERS

_REBUILDS = 256  # sets of shares to try
_DISAGREEMENTS = (
    2  # rounds of settling in which members may differ about who is lost: word of a death takes one
)


class Member(Station):
    """A member that plays one attempt.

    Args:
        me: this member's number.
        identity: its private key, whose public part is `terms.members[me]`.
        payload: gives this member's words [words] uint32.
    """

    def __init__(
        self, terms: PublicParameters, me: int, identity: Ed25519PrivateKey, payload: Callable[[], np.ndarray]
    ):
        super().__init__(terms, me, identity)
        self._payload, self._mask = payload, X25519PrivateKey.generate()
        self._own, self._nonce = shamir.to_bytes(shamir.draw()), secrets.token_bytes(KEY)
        self._lost: frozenset[int] = frozenset()
        self._signatures: list[bytes] | None = None  # the certificate
        self._suspected: frozenset[int] = frozenset()  # of having done wrong in a message to this member
        self._either: list[
            frozenset[int]
        ] = []  # sets with one at fault in each, as far as only this member can tell
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
        except (
            Suspicion
        ) as suspicion:  # the others know nothing of it, and would take this member for lost if it just left
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
        body = (
            public_bytes(self._onion)
            + public_bytes(self._mask)
            + digest(b"nonce", self._nonce)
            + digest(b"own", self._own)
        )
        message = body + self._identity.sign(digest(b"announce", self.context, body))
        came = yield self._same("announce", message)
        for i, text in enumerate(came):
            body = bytes(text[:-SIGNATURE])
            signature = bytes(text[-SIGNATURE:])
            try:
                check_signature(self.terms.members[i], signature, digest(b"announce", self.context, body))
            except Refused:
                raise Suspicion(
                    f"member {i} announced itself with other settings, another roster, or a key that is not "
                    "its own",
                    i,
                ) from None
            for at in (0, KEY):
                try:
                    agree(self._onion, body[at : at + KEY])
                except Refused:
                    raise Suspicion(f"member {i} announced a key that agrees on nothing", i) from None
        columns = [[bytes(text[at : at + KEY]) for text in came] for at in range(0, 4 * KEY, KEY)]
        self._known = Known(columns[0], columns[1], columns[3])
        self._committed = columns[2]

    def _reveal(self) -> Steps:
        shares = shamir.split(shamir.from_bytes(self._own), self.n, self.terms.threshold)
        parts = [
            self._nonce
            + seal(self._cipher, self._share_key(self.me, i), shamir.to_bytes(shares[i]), self.context)
            for i in range(self.n)
        ]
        came = yield Swap("reveal", parts, [len(part) for part in parts])
        for i, text in enumerate(came):
            if digest(b"nonce", bytes(text[:KEY])) != self._committed[i]:
                raise Suspicion(f"member {i} revealed another part of the beacon than it had committed to", i)
            try:
                share = open_sealed(
                    self._cipher, self._share_key(i, self.me), bytes(text[KEY:]), self.context
                )
            except Refused:
                raise Suspicion(
                    f"the share that member {i} sent to member {self.me} does not open", i
                ) from None
            self._known.shares[i] = shamir.from_bytes(share)
        self._known.beacon = digest(b"beacon", self.context, *(bytes(text[:KEY]) for text in came))
        self.context = digest(self.context, self._known.beacon)  # all that follows belongs to this beacon
        self.plan = paths.draw(
            self._known.beacon, self.n, self.terms.words, self.terms.hops, self.terms.chunk_words
        )
        self._masks = (
            Masks(
                self._cipher, self.context, self.me, private=self._mask, keys=self._known.mask, own=self._own
            )
            if self.terms.masked
            else None
        )

    def _share_key(self, giver: int, holder: int) -> bytes:
        other = holder if giver == self.me else giver
        secret = agree(self._mask, self._known.mask[other])
        return derive_key(
            secret, b"share", self.terms.context, giver.to_bytes(4, "big"), holder.to_bytes(4, "big")
        )

    # The commitment.

    def _vote(self) -> Steps:
        """Whether anybody has a complaint, before anybody signs: so one that complains to some only keeps all
        from committing.
        """
        complaint = min(self._complaints, default=NO_CHUNK)
        came = yield self._same("vote", self._digest + b"".join(self._lists) + complaint.to_bytes(4, "big"))
        texts = [bytes(text) for text in came]
        differing = {i for i, text in enumerate(texts) if text[:HASH] != self._digest}
        if differing:
            i = min(differing)
            owner = next(
                (o for o in range(self.n) if texts[i][HASH * (1 + o) : HASH * (2 + o)] != self._lists[o]),
                self.me,
            )
            self._either = [frozenset({owner, i})]  # which of them, all cannot tell alike
            raise Suspicion(
                f"owner {owner} told members {i} and {self.me} different lists, or one of them says so"
            )
        complaints = {i: int.from_bytes(text[-4:], "big") for i, text in enumerate(texts)}
        chunk = min((c for c in complaints.values() if c < self.plan.chunks), default=NO_CHUNK)
        if chunk != NO_CHUNK:
            yield from self._testify(chunk, frozenset(i for i, c in complaints.items() if c == chunk))

    def _confirm(self) -> Steps:
        scalar = self._masks.scalar(ring.check_word(self._words, self._factors())) if self._masks else 0
        came = yield self._same(
            "confirm", scalar.to_bytes(8, "big") + self._identity.sign(self._confirmed(scalar))
        )
        texts = [bytes(text) for text in came]
        self._adopt(
            [text[8:] for text in texts], [int.from_bytes(text[:8], "big") for text in texts], whose=True
        )

    def _confirmed(self, scalar: int) -> bytes:
        return digest(b"confirm", self.context, self._digest, scalar.to_bytes(8, "big"))

    def _adopt(self, signatures: list[bytes], scalars: list[int], whose: bool = False) -> bool:
        """Take signatures for the certificate, if all of them hold."""
        for i, (signature, scalar) in enumerate(zip(signatures, scalars)):
            try:
                check_signature(self.terms.members[i], signature, self._confirmed(scalar))
            except Refused:
                if whose:
                    raise Suspicion(f"member {i} did not sign what it confirmed", i) from None
                return False
        self._signatures = signatures
        self._scalars = scalars
        return True

    def _factors(self) -> ring.Stream:
        """Random factors of the check, that nobody could know before the lists were told."""
        seed = derive_key(self._digest, b"factors")
        part = iter(range(2**32))
        return lambda out: crypto.fill_key_stream(self._cipher, seed, next(part), out)

    def _testify(self, chunk: int, accusers: frozenset[int]) -> Steps:
        """All tell what they know of one chunk of this attempt, which is void. Masked, it says nothing about
        anybody's words.
        """
        if not self.terms.masked:
            raise Void(
                f"chunk {chunk} did not come through the members {self.plan.stations[chunk]} as it was "
                "sent; without masks, looking for "
                "who did it would show whose it was",
                blamed=[frozenset(self.plan.stations[chunk]) | accusers],
            )
        own = Testimony.of(self, chunk)
        came = yield self._same("testify", own.pack())
        stories = [Testimony.unpack(bytes(text), self.plan, self.n) for text in came]
        blamed = judge(
            self._cipher,
            self.context,
            self.plan,
            chunk=chunk,
            keys=self._known.onion,
            stories=stories,
            listed=self._listed[chunk],
            accusers=accusers,
        )
        names = "; ".join(" or ".join(f"member {i}" for i in sorted(group)) for group in blamed)
        raise Void(
            f"chunk {chunk} did not come through as it was sent, by the doing of {names}", blamed=blamed
        )

    # After the commitment.

    def _finish(self) -> Steps:
        """The sum. Whoever is lost by now stays in it."""
        told = yield from self._tell_secrets()
        duties = self._duties()
        width = 4 * self.plan.chunk_words
        mine = BUFFERS.take(len(duties), self.plan.chunk_words, dtype=np.uint32)
        for chunk, words in zip(duties, mine):
            words[:] = self._sums[chunk]
            remove_own(self._cipher, told, chunk, words)
        came = yield self._same(
            "sums", mine.reshape(-1).view(np.uint8), [width * len(self._duties(i)) for i in range(self.n)]
        )
        total = BUFFERS.take(self.plan.chunks * self.plan.chunk_words, dtype=np.uint32)
        for i, data in enumerate(came):
            for at, chunk in enumerate(self._duties(i)):
                total[chunk * self.plan.chunk_words : (chunk + 1) * self.plan.chunk_words] = np.frombuffer(
                    data, np.uint32, self.plan.chunk_words, at * width
                )
        if self._masks and remove_own_scalars(told, sum(self._scalars)) != ring.check_word(
            total[: self.terms.words], self._factors()
        ):
            raise Void("the sums that the owners gave are not those of what was sent", fatal=True)
        yield from self._leave("done")
        return Agreed(total[: self.terms.words], self.terms.members)

    def _duties(self, member: int | None = None) -> list[int]:
        """Chunks whose sums a member gives to the others: its own, and those of a lost member that it
        keeps.
        """
        member = self.me if member is None else member
        if member in self._lost:
            return []
        heirs = [owner for owner in self._lost if paths.backup_of(owner, self.n) == member]
        return sorted(chunk for owner in (member, *heirs) for chunk in self.plan.owned(owner))

    def _tell_secrets(self) -> Steps:
        """Everyone's own-mask secrets: told, or rebuilt for those who are lost."""
        if not self.terms.masked:
            return {}
        shares = b"".join(
            shamir.to_bytes(self._known.shares[i] if i in self._lost else 0) for i in range(self.n)
        )
        came = yield self._same("unmask", self._own + shares)
        told = {i: bytes(text[:KEY]) for i, text in enumerate(came) if i not in self._lost}
        for lost in self._lost:
            at = KEY * (1 + lost)
            shares = {
                i: shamir.from_bytes(bytes(text[at : at + KEY]))
                for i, text in enumerate(came)
                if i not in self._lost
            }
            told[lost] = self._rebuilt(shares, self._known.promised[lost])
        for i in (i for i, secret in told.items() if digest(b"own", secret) != self._known.promised[i]):
            if i in self._lost:
                raise Void(
                    f"the shares of member {i}'s secret do not fit together: somebody told another one than "
                    "it was given",
                    fatal=True,
                )
            raise Lost(frozenset({i}))  # the others hold shares of the one it had promised
        return told

    def _rebuilt(self, shares: dict[int, int], promised: bytes) -> bytes:
        """The secret that is as promised, from whichever shares give it: one false share spoils only the sets
        it is in.
        """
        secret = b""
        for some in itertools.islice(itertools.combinations(shares.items(), self.terms.threshold), _REBUILDS):
            secret = shamir.to_bytes(shamir.rebuild(dict(some)))
            if digest(b"own", secret) == promised:
                break
        return secret

    # Where members were lost.

    def _settle(self) -> Steps:
        """The survivors agree on who is lost, and on whether the set was committed. Raises: Void where it was
        not.

        Nobody is lost because somebody says so: each waits for it, and hears nothing. Where members still
        differ after that, `outvoted` decides.
        """
        for attempt in itertools.count():
            if self.n - len(self._lost) < self.terms.threshold:
                raise Void(
                    f"only {self.n - len(self._lost)} of {self.n} members are left, {self.terms.threshold} "
                    "are needed",
                    self._lost,
                    fatal=True,
                )
            before = self._lost
            agreed = True
            lost = pack_members(before)
            suspects = pack_members(self._suspected)
            empty = bytes((SIGNATURE + 8) * self.n)
            certificate = (
                b"".join(s + v.to_bytes(8, "big") for s, v in zip(self._signatures, self._scalars))
                if self._signatures
                else empty
            )
            came = yield self._same("settle", lost + suspects + certificate)
            accused: dict[int, set[int]] = {}
            claims: dict[int, frozenset[int]] = {}
            for i, text in enumerate(came):
                if i in before:
                    continue
                agreed = agreed and bytes(text[:HASH]) == lost
                claims[i] = unpack_members(bytes(text[:HASH]), self.n)
                for j in unpack_members(bytes(text[HASH : 2 * HASH]), self.n):
                    accused.setdefault(j, set()).add(i)
                records = [
                    bytes(text[at : at + SIGNATURE + 8]) for at in range(2 * HASH, len(text), SIGNATURE + 8)
                ]
                if not self._signatures and any(records[0]) and self._digest:
                    self._adopt(
                        [r[:SIGNATURE] for r in records],
                        [int.from_bytes(r[SIGNATURE:], "big") for r in records],
                    )
            if agreed:
                break
            if attempt >= _DISAGREEMENTS - 1:
                self._lost |= outvoted(claims)
                if self.me in self._lost:
                    raise Void("the others take this member for lost", self._lost - {self.me}, fatal=True)
        if self._signatures is None:
            yield from self._leave("void")
            raise Void(
                self._reason
                or (
                    "members were lost before the sum was settled"
                    if self._lost
                    else "a member has given up the attempt"
                ),
                self._lost,
                [*suspicions(accused, self.n - len(self._lost)), *self._either],
            )
        orphans = [owner for owner in self._lost if paths.backup_of(owner, self.n) in self._lost]
        if orphans:
            raise Void(
                f"members {orphans[0]} and {paths.backup_of(orphans[0], self.n)}, who both kept the same "
                "sums, are lost",
                self._lost,
                fatal=True,
            )

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
        return Swap(
            state,
            [b"" if i in self._lost else message for i in range(self.n)],
            [0 if i in self._lost else sizes[i] for i in range(self.n)],
        )

"""What sites agree on about the state of a run: the one to go on from at a start, and after rounds the
signatures of all that took part.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedspeed.errors import FedSpeedError, JournalError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.packed_tensors import check_size, from_message, to_message
from fedspeed.log import LOG
from fedspeed.routing.agreed_broadcast import Group, broadcast
from fedspeed.routing.anonymous.crypto import DIGEST, digest
from fedspeed.routing.exchange import Exchange
from fedspeed.routing.listen_address import Membership
from fedspeed.routing.state_certificate import MAX_BYTES, StateCertificate, certify
from fedspeed.routing.state_claim import StateClaim, TensorsDigest
from fedspeed.routing.transport import Payload
from fedspeed.session.state_choice import Choice, Kind, Offer, choose

_ANNOUNCEMENT = struct.Struct(f">BI{DIGEST}s")  # kind, length of what is offered, its digest
BEGINNING = bytes(DIGEST)  # in place of the digest of a claim: a start from the beginning
REFUSAL = b"\xff" * DIGEST  # the same: a site goes on from nothing that is offered


@dataclass(frozen=True)
class OwnState:
    """Hold the newest state of this site's journal.

    Attributes:
        claim: describes it. certificate: its signatures; None where the journal has none that are valid.
        tensors: as the journal stores them.
        best: global tensors of the best round; None where they are the state's own, or missing.
    """

    claim: StateClaim
    certificate: StateCertificate | None
    tensors: Arrays
    best: Arrays | None = None


@dataclass(frozen=True)
class AgreedState:
    """Hold the state that all sites go on from.

    Attributes:
        claim: describes it. tensors: as journals store them. best: see `OwnState`.
        new_certificate: packed, where the sites have signed the state just now.
    """

    claim: StateClaim
    tensors: Arrays
    best: Arrays | None
    new_certificate: bytes = b""


class SiteAgreement:
    """Agreements of this site with the others. All sites call each method together.

    Args:
        exchange: of this site. membership: which member of the roster it is.
        session: digest of the session (routing.session_hello). settings: digest of the settings, without the
            roster.
        is_fresh: whether this site's user wants to start anew.

    Attributes:
        run: digest of the session in which the run began; part of every claim.
    """

    def __init__(
        self, exchange: Exchange, membership: Membership, *, session: bytes, settings: bytes, is_fresh: bool
    ):
        self._exchange = exchange
        self._membership = membership
        self._session = session
        self._settings = settings
        self._is_fresh = is_fresh
        self.run = session

    @property
    def settings(self) -> bytes:
        """The digest of the settings that certificates are for."""
        return self._settings

    def certify(self, claim: StateClaim) -> bytes:
        """Return the certificate of a state, packed: the signatures of all sites that are left.

        Raises:
            FedSpeedError: a site has another state, or has not signed it; names it.
            LostPeerError: a site is missing.
        """
        return certify(self._group(), self._settings, claim).pack()

    def agree(
        self, own: OwnState | None, layout_of: Callable[[int], Layout], known_best: Layout
    ) -> AgreedState | None:
        """Return the state that all sites go on from; None for a start from the beginning.

        Args:
            own: of this site's journal, if there is one.
            layout_of: returns the layout of a round's state as journals store it, without folded arrays.
            known_best: the same of the global tensors alone, in any round.

        Raises:
            FedSpeedError: the sites do not go on from the same state; names them.
            LostPeerError: a site is missing.
        """
        group = self._group()
        offers = self._exchange_offers(group, own)
        choice = self._exchange_choices(group, offers)
        claim = choice.claim
        if claim is None:
            return None
        new_certificate = b""
        if choice.is_unsigned:
            claim = replace(claim, run=self._session)
            new_certificate = self.certify(claim)
        self.run = claim.run
        is_own = own is not None and own.claim == choice.claim
        tensors = self._transfer(
            group,
            f"the state of round {claim.round}",
            own.tensors if own is not None and is_own else None,
            holders=choice.holders,
            expected=claim.state,
            known=layout_of(claim.round),
        )
        best = None
        if claim.has_best and claim.best_round != claim.round:
            best = self._transfer(
                group,
                f"the best state, of round {claim.best_round}",
                own.best if own is not None and is_own else None,
                holders=choice.holders,
                expected=claim.best,
                known=known_best,
            )
        return AgreedState(claim, tensors, best, new_certificate)

    def _group(self) -> Group:
        """Return the sites that are left."""
        roster = self._membership.roster
        present = self._exchange.present
        return Group(
            me=present.index(roster.keys.index(self._membership.public)),
            key=self._membership.key,
            members=tuple(roster.keys[i] for i in present),
            names=tuple(roster.members[i].name for i in present),
            swap=self._exchange.swap,
        )

    def _exchange_offers(self, group: Group, own: OwnState | None) -> list[Offer]:
        """Return what all sites offer, with verified certificates.

        Raises:
            FedSpeedError: a site has not sent what it announced; names it.
        """
        kind, content = self._own_offer(own)
        label = "the announcement of a state"
        announcement = _ANNOUNCEMENT.pack(kind, len(content), digest(content))
        announced = [
            _ANNOUNCEMENT.unpack(body) for body in broadcast(group, self._session, label, announcement)
        ]
        for name, (number, length, _) in zip(group.names, announced, strict=True):
            if number not in list(Kind) or length > MAX_BYTES:
                raise FedSpeedError(
                    f"{name} announces a state of kind {number} in {length} bytes, of at most {MAX_BYTES}",
                    remedy="all must run the same version of FedSpeed",
                )
        contents = group.exchange(
            [content] * group.size, [length for _, length, _ in announced], "the certificate of its state"
        )
        for name, (_, _, expected), received in zip(group.names, announced, contents, strict=True):
            if digest(received) != expected:
                raise FedSpeedError(
                    f"{name} sent this site another certificate than it had announced",
                    remedy="ask that site; all must run the same version of FedSpeed",
                )
        kinds = [Kind(number) for number, _, _ in announced]
        return [self._offer(kind, content) for kind, content in zip(kinds, contents, strict=True)]

    def _own_offer(self, own: OwnState | None) -> tuple[Kind, bytes]:
        """Return the kind of this site's offer, and its content."""
        if own is None:
            return (Kind.FRESH if self._is_fresh else Kind.NONE), b""
        if own.certificate is None:
            return Kind.UNSIGNED, own.claim.pack()
        return Kind.CERTIFIED, own.certificate.pack()

    def _offer(self, kind: Kind, content: bytes) -> Offer:
        """Return an offer that was received; a certificate that proves nothing becomes a problem."""
        try:
            if kind == Kind.UNSIGNED:
                return Offer(kind, StateClaim.unpack(content))
            if kind != Kind.CERTIFIED:
                return Offer(kind)
            certificate = StateCertificate.unpack(content)
        except ValueError as error:
            return Offer(kind, problem=f"what it offers is ignored: {error}")
        problem = certificate.problem(self._settings)
        if problem:
            described = certificate.claim.describe()
            return Offer(kind, problem=f"the certificate of its {described} is ignored: {problem}")
        return Offer(kind, certificate.claim, certificate)

    def _exchange_choices(self, group: Group, offers: Sequence[Offer]) -> Choice:
        """Return the state that all sites have chosen.

        Raises:
            FedSpeedError: they have chosen different ones; names them.
        """
        choice = Choice()
        failure = None
        try:
            choice = choose(offers, group.me, group.members, group.names)
        except FedSpeedError as error:  # the others are informed, then it is raised
            failure = error
        for remark in choice.remarks:
            LOG.info(remark)
        own = REFUSAL if failure is not None else _chosen(choice.claim)
        bodies = broadcast(group, self._session, "the choice of a state", own)
        if failure is not None:
            raise failure
        if set(bodies) != {own}:
            known = {_chosen(offer.claim): offer.claim.describe() for offer in offers if offer.claim}
            known |= {BEGINNING: "the beginning", REFUSAL: "none that is offered"}
            parts = ", ".join(
                f"{name} from {known.get(body, 'one that nobody offers')}"
                for name, body in zip(group.names, bodies, strict=True)
            )
            remarks = f" ({'; '.join(choice.remarks)})" if choice.remarks else ""
            raise FedSpeedError(
                f"the sites would go on from different states: {parts}{remarks}",
                remedy="compare the journals; a site whose folder is moved aside takes the others' state if "
                "most of them have signed it",
            )
        return choice

    def _transfer(
        self,
        group: Group,
        what: str,
        own: Arrays | None,
        *,
        holders: Sequence[int],
        expected: TensorsDigest,
        known: Layout,
    ) -> Arrays:
        """Return tensors of a certified digest on all sites. Those that have them send them to those that
        have not, one holder after the other until all have the right ones.

        Args:
            own: this site's; None if it lacks them. holders: numbers of sites that should have them.
            known: their layout, with any folded arrays.

        Raises:
            JournalError: no holder has sent the right ones; names those that sent others.
        """
        check_size(expected, known)
        liars: list[str] = []
        for attempt, holder in enumerate((*holders, None)):
            flags = broadcast(
                group, self._session, f"the need of {what}, attempt {attempt}", bytes([own is None])
            )
            needing = [i for i, flag in enumerate(flags) if flag != b"\0"]
            if not needing:
                break
            if holder is None:
                named = f"; {', '.join(liars)} sent other tensors than the signed ones" if liars else ""
                raise JournalError(
                    f"{what} is missing at {group.list_names(needing)}{named}; start anew with --fresh on "
                    "all sites, or copy the journal's files back from elsewhere"
                )
            if holder in needing:
                continue
            received = _send_tensors(
                group, what, own, holder=holder, needing=needing, nbytes=expected.message_bytes
            )
            if own is None:
                own = from_message(received, expected, known)
                if own is None:
                    liars.append(group.names[holder])
                    LOG.info(f"{group.names[holder]} sent other tensors than the signed ones as {what}")
        assert own is not None, "this site needs nothing more"
        return own


def _send_tensors(
    group: Group, what: str, own: Arrays | None, *, holder: int, needing: Sequence[int], nbytes: int
) -> bytes:
    """Send tensors from one site to those that need them; return what this one has received.

    Args:
        nbytes: of the message.
    """
    parts: list[Payload] = [b""] * group.size
    sizes = [0] * group.size
    if group.me == holder:
        assert own is not None, "a holder has the tensors"
        message = to_message(own)
        parts = [message if i in needing else b"" for i in range(group.size)]
    if group.me in needing:
        sizes[holder] = nbytes
    return group.exchange(parts, sizes, what)[holder]


def _chosen(claim: StateClaim | None) -> bytes:
    """Return the digest by which sites compare their choices."""
    return BEGINNING if claim is None else digest(claim.pack())

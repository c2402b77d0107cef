"""The decision from which state a site goes on, given what all sites offer at a start. Pure.

A claim of a peer decides nothing. A state counts only with a certificate: the signatures of the members that
took part in its round. This site accepts it if it has signed it itself, or if the signers are a majority of
the current roster. It never goes below the newest state that it holds a certificate for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from fedspeed.errors import FedSpeedError
from fedspeed.routing.state_certificate import StateCertificate, has_majority
from fedspeed.routing.state_claim import StateClaim

ALL_ANEW = "start anew with --fresh on all sites"


class Kind(IntEnum):
    """What a site offers at a start.

    NONE: it has no state. FRESH: it has none, and its user wants none (--fresh). CERTIFIED: a state with a
    certificate. UNSIGNED: a state without one, as journals of earlier versions have.
    """

    NONE = 0
    FRESH = 1
    CERTIFIED = 2
    UNSIGNED = 3


@dataclass(frozen=True)
class Offer:
    """Hold what a site offers.

    Attributes:
        claim: describes the state; None where there is none. certificate: None where there is none, or the
            one that was sent proves nothing.
        problem: why the certificate that was sent proves nothing.
    """

    kind: Kind
    claim: StateClaim | None = None
    certificate: StateCertificate | None = None
    problem: str = ""


@dataclass(frozen=True)
class Choice:
    """Hold the state that a site goes on from.

    Attributes:
        claim: describes it; None for a start from the beginning.
        holders: numbers of the sites that have offered exactly this one.
        is_unsigned: whether nobody has a certificate of it, so that all sign it now.
        remarks: why offers were not accepted, one text each.
    """

    claim: StateClaim | None = None
    holders: tuple[int, ...] = ()
    is_unsigned: bool = False
    remarks: tuple[str, ...] = field(default=(), compare=False)


def choose(offers: Sequence[Offer], me: int, roster: Sequence[bytes], names: Sequence[str]) -> Choice:
    """Return the state that site `me` goes on from.

    Args:
        offers: of all sites, whose certificates have been verified. roster: public keys of all, in the same
            order. names: of all, for messages.

    Raises:
        FedSpeedError: this site cannot go on from anything that is offered; names the sites.
    """
    _check_fresh(offers, names)
    remarks = [f"{names[i]}: {offer.problem}" for i, offer in enumerate(offers) if offer.problem]
    accepted: dict[StateClaim, list[int]] = {}
    for i, offer in enumerate(offers):
        if offer.certificate is None or offer.claim is None:
            continue
        problem = refusal(offers, offer.certificate, me, roster)
        if problem:
            remarks.append(f"{names[i]}: its state of {offer.claim.describe()} is not accepted: {problem}")
        else:
            accepted.setdefault(offer.claim, []).append(i)
    if not accepted:
        return _without_certificates(offers, names, tuple(remarks))
    newest = max(claim.round for claim in accepted)
    candidates = [claim for claim in accepted if claim.round == newest]
    if len(candidates) > 1:
        parties = "; ".join(f"{_listed(accepted[claim], names)}: {claim.describe()}" for claim in candidates)
        raise FedSpeedError(
            f"sites hold different states of round {newest}, all of them signed: {parties}",
            remedy="compare the journals; a site whose folder is moved aside takes the others' state",
        )
    own = offers[me]
    if own.kind == Kind.UNSIGNED and own.claim is not None and own.claim.round > newest:
        raise FedSpeedError(
            f"this site's journal has round {own.claim.round} without the signatures of the other sites, "
            f"which have signed round {newest} only",
            remedy="move this site's folder aside to take the others' state, or " + ALL_ANEW,
        )
    return Choice(candidates[0], tuple(accepted[candidates[0]]), remarks=tuple(remarks))


def refusal(offers: Sequence[Offer], certificate: StateCertificate, me: int, roster: Sequence[bytes]) -> str:
    """Return why site `me` does not accept a valid certificate; empty if it does.

    Args:
        offers: of all sites. roster: public keys of all, in the same order.
    """
    own = offers[me]
    if own.kind == Kind.CERTIFIED and own.claim is not None:
        if own.claim == certificate.claim:
            return ""
        if own.claim.run != certificate.claim.run:
            return "it is of another run of the same settings than this site's journal"
    if roster[me] in certificate.members:
        return ""
    # Sites that offer the state of a certificate stand by it, under keys that may be newer than those in it.
    vouching = [key for key, offer in zip(roster, offers, strict=True) if offer.claim == certificate.claim]
    if has_majority([*certificate.members, *vouching], roster):
        return ""
    return "this site has not signed it, and its signers are no majority of the roster"


def _check_fresh(offers: Sequence[Offer], names: Sequence[str]) -> None:
    """Refuse to start where one site wants to start anew and another has a state.

    Raises:
        FedSpeedError: so it is; names the sites.
    """
    fresh = [i for i, offer in enumerate(offers) if offer.kind == Kind.FRESH]
    holding = [
        i
        for i, offer in enumerate(offers)
        if offer.certificate is not None or (offer.kind == Kind.UNSIGNED and offer.claim is not None)
    ]
    if fresh and holding:
        starts = "starts" if len(fresh) == 1 else "start"
        offers_one = "offers" if len(holding) == 1 else "offer"
        raise FedSpeedError(
            f"{_listed(fresh, names)} {starts} anew with --fresh, but {_listed(holding, names)} {offers_one} "
            "an earlier run's state",
            remedy="give --fresh on all sites, or on none (the folder that --fresh has moved aside must then "
            "be moved back)",
        )


def _without_certificates(offers: Sequence[Offer], names: Sequence[str], remarks: tuple[str, ...]) -> Choice:
    """Return the choice where no certificate was accepted: the beginning, or a state that all have."""
    unsigned = [i for i, offer in enumerate(offers) if offer.kind == Kind.UNSIGNED]
    if not unsigned:
        return Choice(remarks=remarks)
    claims = {offer.claim for offer in offers}
    if len(unsigned) == len(offers) and len(claims) == 1:
        return Choice(claims.pop(), tuple(unsigned), is_unsigned=True, remarks=remarks)
    found = "; ".join(
        f"{name}: {offer.claim.describe() if offer.claim else 'none'}"
        for name, offer in zip(names, offers, strict=True)
    )
    raise FedSpeedError(
        f"{_listed(unsigned, names)} has a journal without the signatures of the other sites, as earlier "
        f"versions wrote it. Sites go on from such a state only if all have the same one; they have {found}",
        remedy=ALL_ANEW,
    )


def _listed(numbers: Sequence[int], names: Sequence[str]) -> str:
    return ", ".join(names[i] for i in numbers)

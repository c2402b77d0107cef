"""Resuming of a site: it offers its journal's newest state, agrees with the other sites on the one to go on
from, and gets that state from them if its journal has another one.
"""

import math
from functools import partial
from typing import TYPE_CHECKING

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.run import RunConfig
from fedspeed.errors import JournalError
from fedspeed.federation import run_progress
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.folded_layout import fits
from fedspeed.federation.layout import Layout
from fedspeed.federation.link import ClientLink
from fedspeed.federation.packed_tensors import tensors_digest
from fedspeed.federation.run_progress import Progress
from fedspeed.routing.state_claim import SHA256, StateClaim

if TYPE_CHECKING:  # they load cryptography, which a plain run does without
    from fedspeed.session.site_agreement import AgreedState, OwnState, SiteAgreement


def resume_site(
    config: RunConfig,
    link: ClientLink,
    *,
    journal: Journal,
    entry: Entry | None,
    fresh: Progress,
    agreement: "SiteAgreement | None",
) -> Progress:
    """Return the progress that all sites start from; `fresh` itself where it is the beginning. Collective
    over all ranks of all sites.

    Args:
        entry: the newest entry of this site's journal, on its gateway, if there is one.
        agreement: of this site with the others, on its gateway; None elsewhere.

    Raises:
        JournalError: the entry does not fit this model, or is not the state that the sites have signed.
        FedSpeedError: the sites do not go on from the same state; names them.
        LostPeerError: a site is missing.
    """
    agreed: AgreedState | None = None

    def agree() -> bytes:
        nonlocal agreed
        assert agreement is not None, "the gateway of a site has one"
        agreed = _agree(config, journal, entry, fresh, agreement)
        return b"" if agreed is None else agreed.claim.pack()

    failed = "this site's gateway could not agree with the other sites on a state"
    packed_claim = link.from_gateway(agree, failed)
    if not packed_claim:
        return fresh
    tensors = link.arrays_from_gateway(None if agreed is None else agreed.tensors)
    return progress_of(StateClaim.unpack(packed_claim), tensors)


def progress_of(claim: StateClaim, packed: Arrays) -> Progress:
    """Return the progress that a claim and the tensors of its state describe."""
    state, moments, previous = run_progress.unpack(packed)
    return Progress(
        claim.round,
        state,
        moments,
        best_round=max(0, claim.best_round),
        best_loss=claim.best_loss if claim.has_best else math.inf,
        best_digest=claim.best,
        stale=claim.stale,
        previous=previous if claim.round else None,
        update_alignment=claim.alignment,
        is_resumed=True,
    )


def journal_layout(config: RunConfig, fresh: Progress, number: int) -> Layout:
    """Return the layout of a round's state as the journal stores it, without folded arrays.

    Args:
        fresh: the progress before round 1. number: of the round.
    """
    previous = fresh.state if config.federation.staleness and number else None
    return Layout.of(run_progress.pack(fresh.state, fresh.moments, previous))


def saved_tensors(journal: Journal, entry: Entry, layout: Layout) -> Arrays:
    """Return the tensors of an entry.

    Args:
        layout: of its round (`journal_layout`).

    Raises:
        JournalError: they are missing, damaged, or of another model.
    """
    saved = journal.tensors(entry)
    if not fits(Layout.of(saved), layout):
        raise JournalError(f"{journal.folder}: its tensors do not fit this model; start anew with --fresh")
    return saved


def own_state(
    config: RunConfig, journal: Journal, entry: Entry, fresh: Progress, settings: bytes
) -> "OwnState":
    """Return the state that this site offers: with the certificate of its journal, if that is valid.

    Args:
        settings: digest of this site's settings.

    Raises:
        JournalError: the tensors are not those that were signed.
    """
    from fedspeed.routing.state_certificate import StateCertificate
    from fedspeed.session.site_agreement import OwnState

    tensors = saved_tensors(journal, entry, journal_layout(config, fresh, entry.round))
    best = _best(journal, entry)
    certificate = None
    try:
        if entry.certificate:
            certificate = StateCertificate.unpack(bytes.fromhex(entry.certificate))
    except ValueError as error:
        raise _refusal(journal, entry, f"its certificate is damaged ({error})") from error
    if certificate is None or certificate.problem(settings):
        return OwnState(_unsigned_claim(entry, tensors, best), None, tensors, best)
    claim = certificate.claim
    if claim.round != entry.round or tensors_digest(tensors) != claim.state:
        raise _refusal(journal, entry, "its tensors are not those that the sites have signed")
    if best is not None and tensors_digest(best) != claim.best:
        best = None
    return OwnState(claim, certificate, tensors, best)


def _agree(
    config: RunConfig, journal: Journal, entry: Entry | None, fresh: Progress, agreement: "SiteAgreement"
) -> "AgreedState | None":
    """Agree with the other sites on a state, and put into this site's journal what it lacks."""
    own = None if entry is None else own_state(config, journal, entry, fresh, agreement.settings)
    agreed = agreement.agree(own, partial(journal_layout, config, fresh), Layout.of(fresh.state))
    if agreed is None:
        return None
    claim = agreed.claim
    if entry is not None and agreed.new_certificate:
        journal.add_certificate(entry, agreed.new_certificate.hex())
    if agreed.best is not None and (own is None or own.best is None):
        journal.save_best(claim.best_round, agreed.best)
    if claim.has_best and claim.best_round == claim.round:
        # `check_best` does not require the file where the newest round is the best one.
        journal.save_best(claim.round, run_progress.unpack(agreed.tensors)[0])
    return agreed


def _best(journal: Journal, entry: Entry) -> Arrays | None:
    """Return the best round's tensors if that is another round; None if their file is missing or damaged."""
    if not entry.has_best or entry.best_round == entry.round:
        return None
    try:
        return journal.load_best(entry.best_round)
    except JournalError:
        return None


def _unsigned_claim(entry: Entry, tensors: Arrays, best: Arrays | None) -> StateClaim:
    """Return what a site claims of an entry without a certificate."""
    progress = Progress(
        entry.round,
        {},
        {},
        best_round=entry.best_round,
        best_loss=entry.best_loss,
        stale=entry.stale,
        update_alignment=entry.likeness,
    )
    is_newest_best = entry.has_best and entry.best_round == entry.round
    best_tensors = run_progress.unpack(tensors)[0] if is_newest_best else best
    if best_tensors is not None:
        progress.best_digest = tensors_digest(best_tensors)
    return run_progress.claim_of(progress, bytes(SHA256), tensors_digest(tensors))


def _refusal(journal: Journal, entry: Entry, reason: str) -> JournalError:
    return JournalError(
        f"{journal.folder}: round {entry.round} cannot be resumed: {reason}; copy the folder back from "
        "elsewhere, or move this run's folder aside to take the state of the other sites"
    )

"""Sites in threads that agree on states, with one that lies. Over TLS: tests/run/test_run_states.py."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.errors import FedSpeedError, JournalError, LostPeerError
from fedspeed.federation.layout import Layout
from fedspeed.federation.packed_tensors import tensors_digest
from fedspeed.routing.anonymous.crypto import digest
from fedspeed.routing.state_certificate import StateCertificate
from fedspeed.session.site_agreement import OwnState, SiteAgreement
from tests.routing.members import SOON_S, Liar, Members, in_threads
from tests.run.states import RUN, SETTINGS, claim, signed, tensors

SESSION = b"session of a start".ljust(32)
BEST = {"w": np.full(3, 9.0, np.float32)}


def layout_of(round):
    return Layout.of(tensors(0))


class Sites(Members):
    """Sites with an agreement each."""

    def agreement(self, i, alter=None, is_fresh=False):
        swap = self.group(i).swap
        exchange = SimpleNamespace(
            present=tuple(range(len(self.keys))), swap=Liar(swap, alter) if alter else swap
        )
        cards = [SimpleNamespace(name=name) for name in self.names]
        roster = SimpleNamespace(keys=self.public, members=cards)
        membership = SimpleNamespace(roster=roster, public=self.public[i], key=self.keys[i])
        return SiteAgreement(exchange, membership, session=SESSION, settings=SETTINGS, is_fresh=is_fresh)

    def own(self, round, value=0.5, keys=None, **more):
        of = claim(round, value, **more)
        keys = self.keys if keys is None else keys
        return OwnState(of, signed(keys, of) if keys else None, tensors(round, value))

    def agree(self, owns, alter=None, liar=None):
        """Return what each site has agreed on, or its error."""
        agreements = [self.agreement(i, alter if i == liar else None) for i in range(len(self.keys))]
        return in_threads([
            lambda i=i: agreements[i].agree(owns[i], layout_of, Layout.of(BEST)) for i in range(len(owns))
        ])


@pytest.fixture(params=[3, 4])
def sites(request):
    return Sites(request.param, SOON_S)


def others(sites, own):
    """Return that the last site has `own`, and the others nothing."""
    return [None] * (len(sites.keys) - 1) + [own]


def test_nobody_has_a_state(sites):
    assert sites.agree(others(sites, None)) == [None] * len(sites.keys)


def test_one_site_that_survived_hands_its_state_and_the_best_one_to_the_others(sites):
    of = claim(3, best_round=1, best_loss=0.25, stale=2, best=tensors_digest(BEST))
    own = OwnState(of, signed(sites.keys, of), tensors(3), BEST)
    for agreed in sites.agree(others(sites, own)):
        assert agreed.claim == of and agreed.best["w"].tolist() == BEST["w"].tolist()
        assert {n: t.tolist() for n, t in agreed.tensors.items()} == {
            n: t.tolist() for n, t in tensors(3).items()
        }


def test_a_claim_without_signatures_is_ignored(sites):
    """Finding 1: a member that claims a finished round at a fresh start, with a state of its own."""
    liar = sites.keys[-1]
    forged = OwnState(claim(4, 6.66), signed([liar], claim(4, 6.66)), tensors(4, 6.66))
    results = sites.agree(others(sites, forged))
    for result in results[:-1]:
        assert "site0 from the beginning" in str(result), "the others begin, and refuse who does not"
    of = claim(4, 6.66)
    claimed = signed(sites.keys[:-1] + [liar], of)
    broken = StateCertificate(
        settings=SETTINGS, claim=of, members=claimed.members, signatures=(bytes(64),) * len(claimed.members)
    )
    results = sites.agree(others(sites, OwnState(of, broken, tensors(4, 6.66))))
    assert results == [None] * len(sites.keys)


def test_nobody_is_rolled_back_to_round_0(sites):
    owns = [sites.own(3)] * (len(sites.keys) - 1) + [sites.own(0)]
    assert [agreed.claim.round for agreed in sites.agree(owns)] == [3] * len(sites.keys)


def test_a_state_of_ones_own_for_one_site_is_refused_and_its_sender_named(sites):
    """Finding 1: the holder sends one receiver other bytes than the others. That one asks the next holder."""
    size = len(sites.keys)

    def alter(number, receiver, part):
        is_state = len(part) == claim(3).state.message_bytes
        return bytes(len(part)) if is_state and receiver == size - 1 else part

    owns = [sites.own(3)] + [None] * (size - 1)
    results = sites.agree(owns, alter, liar=0)
    for error in results:
        assert type(error) is JournalError and f"is missing at site{size - 1}" in str(error)
    assert "site0 sent other tensors than the signed ones" in str(results[-1])
    owns = [sites.own(3), sites.own(3)] + [None] * (size - 2)
    agreed = sites.agree(owns, alter, liar=0)
    assert all(tensors_digest(one.tensors) == claim(3).state for one in agreed), "the next holder was asked"


def test_different_certificates_for_different_sites_are_found_out(sites):
    def alter(number, receiver, part):
        is_certificate = len(part) == len(sites.own(3).certificate.pack())
        return bytes(len(part)) if is_certificate and receiver == 0 else part

    results = sites.agree(others(sites, sites.own(3)), alter, liar=len(sites.keys) - 1)
    assert type(results[0]) is FedSpeedError
    assert f"site{len(sites.keys) - 1} sent this site another certificate" in str(results[0])


def test_two_announcements_convict_their_member(sites):
    liar = len(sites.keys) - 1

    def alter(number, receiver, part):
        if number or receiver:
            return part
        body = b"\0" + part[1:-64]
        return body + sites.keys[liar].sign(
            digest(b"agreed broadcast", SESSION, b"the announcement of a state", digest(body))
        )

    results = sites.agree(others(sites, sites.own(3)), alter, liar=liar)
    for error in results[:-1]:
        assert type(error) is FedSpeedError and f"site{liar} signed different statements" in str(error)


def test_old_journals_that_are_the_same_are_signed_at_the_start(sites):
    old = sites.own(2, keys=(), run=bytes(32))
    for agreed in sites.agree([old] * len(sites.keys)):
        assert agreed.claim == claim(2, run=SESSION)
        certificate = StateCertificate.unpack(agreed.new_certificate)
        assert certificate.problem(SETTINGS) == "" and certificate.members == sites.public


def certified(sites, claims, alter=None, liar=None):
    agreements = [sites.agreement(i, alter if i == liar else None) for i in range(len(sites.keys))]
    return in_threads([lambda i=i: agreements[i].certify(claims[i]) for i in range(len(claims))])


def test_a_round_has_the_signatures_of_all(sites):
    packed = certified(sites, [claim(2, run=RUN)] * len(sites.keys))
    assert len(set(packed)) == 1 and StateCertificate.unpack(packed[0]).problem(SETTINGS) == ""


@pytest.mark.parametrize("how", ["withheld", "other", "unsigned"])
def test_without_one_signature_there_is_no_certificate_and_its_member_is_named(sites, how):
    liar = len(sites.keys) - 1
    claims = [claim(2)] * liar + [claim(2, 0.25) if how == "other" else claim(2)]
    changes = {"withheld": b"", "unsigned": claim(2).pack() + bytes(64)}

    def alter(number, receiver, part):
        return changes[how] if receiver == 0 else part

    results = certified(sites, claims, None if how == "other" else alter, liar)
    expected = {
        "withheld": (LostPeerError, f"site{liar} did not send its signature of the state of round 2"),
        "other": (FedSpeedError, f"site{liar} has another state, round 2"),
        "unsigned": (FedSpeedError, f"site{liar} has not signed the state of round 2"),
    }
    kind, text = expected[how]
    assert type(results[0]) is kind and text in str(results[0])
    assert "is not written to the journal" in str(results[0]) or how == "withheld"

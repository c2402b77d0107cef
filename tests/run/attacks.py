"""What a site does that lies about the state of a run. Each function changes the code of its own process;
tests name it in TEST_ATTACK.
"""

import os
from dataclasses import replace

import numpy as np


def send_dead_states() -> None:
    """Send the state that was signed to one site only (TEST_TARGET), and one of zeros to the others."""
    from fedspeed.session import site_agreement

    def exchange(group, what, own, *, holder, needing, nbytes):
        target = int(os.environ["TEST_TARGET"])
        message = site_agreement.to_message(own)
        dead = np.concatenate([message[:2], np.zeros(len(message) - 2, np.uint8)])
        parts = [b""] * group.size
        for i in needing:
            parts[i] = message if i == target else dead
        group.exchange(parts, [0] * group.size, what)
        return b""

    site_agreement._send_tensors = exchange


def claim_to_have_finished() -> None:
    """Offer a state of round 4 at a fresh start, in the names of all and signed by this site alone."""
    from fedspeed.routing.state_certificate import StateCertificate, statement_of
    from fedspeed.session import site_resume
    from fedspeed.session.site_agreement import OwnState, SiteAgreement

    agree = SiteAgreement.agree

    def forge(self, own, layout_of, known_best):
        layout = layout_of(4)
        tensors = layout.unflatten(np.full(layout.size, 6.66e-2, np.float32))
        group = self._group()
        of = site_resume.StateClaim(run=self.run, round=4, state=site_resume.tensors_digest(tensors))
        mine = self._membership.key.sign(statement_of(self.settings, group.members, of))
        certificate = StateCertificate(
            settings=self.settings, claim=of, members=group.members, signatures=(mine,) * group.size
        )
        return agree(self, OwnState(of, certificate, tensors), layout_of, known_best)

    SiteAgreement.agree = forge


def sign_another_state() -> None:
    """Sign another state of round 1 than the one that the others have."""
    from fedspeed.session.site_agreement import SiteAgreement

    certify = SiteAgreement.certify

    def lie(self, claim):
        return certify(self, replace(claim, stale=7) if claim.round == 1 else claim)

    SiteAgreement.certify = lie


def send_gradients_that_are_not_finite() -> None:
    """Have rank 1 send the server of split learning gradients without one finite value."""
    from fedspeed.routing.channel import Channel

    send = Channel.send

    def poisoned(self, peer, arrays):
        name = "output_gradient"
        if os.environ["RANK"] == "1" and name in arrays:
            arrays = {**arrays, name: np.full_like(arrays[name], np.nan)}
        return send(self, peer, arrays)

    Channel.send = poisoned

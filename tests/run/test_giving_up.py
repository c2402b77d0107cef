"""A site that ends with an error ends the run for all: the others do not sum without it."""

import numpy as np
import pytest

from fedspeed.errors import LostPeerError
from fedspeed.routing.anonymous.exchange import AnonymousExchange
from fedspeed.routing.config import RoutingConfig
from fedspeed.routing.identity import read_key
from fedspeed.session.deployment import SiteDeployment
from tests.limits import LIMIT_S
from tests.routing.contract import in_threads
from tests.routing.sites import Sites
from tests.tiny import run_config

CONFIG = RoutingConfig(
    "mix+mask", cell_kib=4, step_deadline_s=LIMIT_S, deadline_s=LIMIT_S, min_participants=2
)


@pytest.mark.parametrize("n", [3, 4])
def test_a_site_that_gives_up_is_not_taken_for_lost(tmp_path, n):
    """Two members of four that lie could make one honest site give up, by a signature that only that one
    finds invalid; the sum of the three that are left would be the update of the other honest one.
    """
    sites = Sites(tmp_path, n)

    def act(transport):
        i = transport.rank
        key = read_key(tmp_path / f"site{i}.key")
        exchange = AnonymousExchange(transport, CONFIG, key, sites.roster.keys, b"settings")
        exchange.start(np.zeros(3), 0.0).wait(LIMIT_S)  # a header, which only the first site refuses
        if i == 0:
            SiteDeployment(run_config()).give_up(transport)
            return
        with pytest.raises(LostPeerError, match="member 0 has ended the attempt or the run"):
            exchange.start(np.ones(9, np.float32), 1.0, label="update of round 1").wait(LIMIT_S)
        exchange.close()

    in_threads(sites.all(), act)

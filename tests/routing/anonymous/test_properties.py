"""Random lies of random coalitions: what holds whatever they do.

No honest member is ever named without a liar beside it. Honest members that finish have the same sum. What
somebody can open holds the updates of all honest members, or of none. All end in time.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspeed.routing.anonymous.attempts import PHASES
from tests.routing.anonymous.liars import KINDS, Lie
from tests.routing.anonymous.worlds import World

PLAYED = [phase for phase in PHASES if not phase.startswith("hop") or phase in ("hop 0", "hop 1", "hop 2")]
ATTEMPTS = ({1}, {2}, {1, 2}, set(range(1, 9)))  # the first is of the first sum; later ones of either


@st.composite
def coalitions(draw):
    """Return (n, liars, lies): a number of members, some of which lie."""
    n = draw(st.integers(3, 5))
    liars = frozenset(draw(st.permutations(range(n)))[: draw(st.integers(1, n - 2))])
    lie = st.builds(
        Lie,
        liar=st.sampled_from(sorted(liars)),
        phase=st.sampled_from(PLAYED),
        kind=st.sampled_from(KINDS),
        receivers=st.frozensets(st.sampled_from(sorted(set(range(n)) - liars)), min_size=1),
        attempts=st.sampled_from(ATTEMPTS).map(frozenset),
        seed=st.integers(0, 10_000),
        alike=st.booleans(),
    )
    return n, liars, draw(st.lists(lie, min_size=1, max_size=4))


def check(coalition):
    n, liars, lies = coalition
    with pytest.MonkeyPatch.context() as patch:
        World(n, liars, lies, patch).check()


@settings(max_examples=80, derandomize=True)
@given(coalitions())
def test_what_holds_whatever_liars_do(coalition):
    check(coalition)


@pytest.mark.slow
@settings(max_examples=600)
@given(coalitions())
def test_what_holds_whatever_liars_do_in_many_runs(coalition):
    check(coalition)

"""Sites over TLS that go on from a state: only from one that has the signatures of its members, whatever a
member claims or sends.
"""

import shutil

import pytest

from tests.run.launched import journal_rounds, records
from tests.run.sites import Federation


@pytest.fixture(scope="module", params=[3, pytest.param(4, marks=pytest.mark.slow)])
def trained(request, shared_workshop):
    """Return sites that have finished a run of one round."""
    federation = Federation(shared_workshop, f"signed{request.param}", request.param)
    ended = [s.wait() for s in federation.start_sites("federation.rounds=1")]
    assert [e.code for e in ended] == [0] * request.param, "\n".join(e.text for e in ended)
    return federation


def folder(federation, i, name):
    return federation.folder / f"runs{i}" / name


def copied(federation, name, sites):
    """Give some sites a copy of what they have of the run, under another name."""
    for i in sites:
        shutil.copytree(federation.run(i), folder(federation, i, name))


def ended_with(federation, name, *arguments, liar=None, attack="", **environment):
    """Return how the sites' runs of this name ended."""
    started = []
    for i in range(federation.size):
        env = {"TEST_ATTACK": attack, **environment} if i == liar else None
        started += federation.start_sites(f"run.name={name}", *arguments, sites=(i,), env=env)
    return [s.wait() for s in started]


def test_one_site_that_survived_hands_its_state_to_the_others(trained):
    """Site 0 has lost its disk, and site 1 only its newest round: nobody goes back for it."""
    name = "survivors"
    copied(trained, name, range(1, trained.size))
    shutil.rmtree(folder(trained, 1, name) / "journal" / "round-000001")
    ended = ended_with(trained, name, "federation.rounds=2")
    assert [e.code for e in ended] == [0] * trained.size, "\n".join(e.text for e in ended)
    adapters = {
        (folder(trained, i, name) / "adapter" / "adapter_model.safetensors").read_bytes()
        for i in range(trained.size)
    }
    assert len(adapters) == 1
    assert [r["round"] for r in records(folder(trained, 0, name))] == [2]


def test_a_site_that_starts_anew_takes_no_earlier_state(trained):
    """Signatures of an earlier run of the same settings stay valid, and any member may have kept them."""
    name = "anew"
    copied(trained, name, range(1, trained.size))
    started = trained.start_sites(f"run.name={name}", "--fresh", sites=(0,))
    started += trained.start_sites(f"run.name={name}", sites=range(1, trained.size))
    for e in (s.wait() for s in started):
        assert e.code == 2 and "site0 starts anew with --fresh, but site1, site2" in e.text, e.text
    assert not (folder(trained, 0, name) / "journal").exists()


def test_a_site_that_sends_each_other_one_another_state_is_named(trained):
    """The target would get the true state, and the others one whose gradient is zero, so that the sum of
    updates is the target's own.
    """
    name = "dead"
    copied(trained, name, [0])
    ended = ended_with(
        trained, name, "federation.rounds=2", liar=0, attack="send_dead_states", TEST_TARGET="1"
    )
    for i, e in enumerate(ended[1:], 1):
        assert e.code == 2 and "Traceback" not in e.text, e.text
        assert f"the state of round 1 is missing at site{2}" in e.text, e.text
        assert ("site0 sent other tensors than the signed ones" in e.text) == (i != 1)
        assert not folder(trained, i, name).exists(), "nothing was trained"


def test_a_site_that_claims_to_have_finished_is_not_believed(trained):
    """It exports nothing at the others, and without its signature there is no round."""
    name = "claimed"
    ended = ended_with(trained, name, liar=trained.size - 1, attack="claim_to_have_finished")
    assert [e.code for e in ended] == [0] * trained.size, "\n".join(e.text for e in ended)
    for i in range(trained.size - 1):
        assert "is ignored: it lacks a valid signature" in ended[i].text
        assert [r["round"] for r in records(folder(trained, i, name))] == [0, 1, 2, 3, 4]


def test_a_round_without_all_signatures_is_not_written_down(trained):
    name = "unsigned"
    liar = trained.size - 1
    ended = ended_with(trained, name, "federation.rounds=2", liar=liar, attack="sign_another_state")
    for i, e in enumerate(ended[:liar]):
        assert e.code == 2 and "Traceback" not in e.text, e.text
        assert f"site{liar} has another state, round 1" in e.text
        assert journal_rounds(folder(trained, i, name)) == [0]
        assert not (folder(trained, i, name) / "adapter").exists()

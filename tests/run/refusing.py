"""A check that a run is refused as every refusal has to be."""

from tests.run.launched import Ended, refusal, tree

SOON_S = 120.0  # found before any rank starts; takes half a second on an idle machine


def assert_refused(
    workshop, *arguments: str, named: tuple[str, ...], limit_s: float = 120.0, run: str = "refused", **options
) -> Ended:
    """Start a run and check its refusal: exit code 2, one message with all of `named`, no traceback, no file
    written.
    """
    before = tree(workshop.runs) if workshop.runs.exists() else {}
    ended = workshop.run(f"run.name={run}", *arguments, limit_s=limit_s, **options)
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text, ended.text
    assert ended.err.count("fedspeed: error:") == 1, ended.err
    if "--json" in arguments:
        assert f"fedspeed: error: {refusal(ended)}\n" in ended.err
    else:
        assert ended.out == ""
    for word in named:
        assert word in ended.err, ended.err
    assert (tree(workshop.runs) if workshop.runs.exists() else {}) == before
    return ended

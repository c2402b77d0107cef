"""A run that must be refused, and what every refusal owes its reader."""

from tests.run.launched import Ended, refusal, tree

SOON_S = 120.0  # found before any rank starts; takes half a second on an idle machine


def assert_refused(
    workshop, *words: str, named: tuple[str, ...], limit_s: float = 120.0, run: str = "refused", **options
) -> Ended:
    """Runs, and holds the refusal to what every refusal owes its reader."""
    before = tree(workshop.runs) if workshop.runs.exists() else {}
    ended = workshop.run(f"run.name={run}", *words, limit_s=limit_s, **options)
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text, ended.text
    assert ended.err.count("fedspeed: error:") == 1, ended.err
    if "--json" in words:
        assert f"fedspeed: error: {refusal(ended)}\n" in ended.err
    else:
        assert ended.out == ""
    for word in named:
        assert word in ended.err, ended.err
    assert (tree(workshop.runs) if workshop.runs.exists() else {}) == before
    return ended

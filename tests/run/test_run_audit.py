"""The commands `fedspeed audit` and `fedspeed keys`."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def fedspeed(*arguments: str, limit_s: float = 120):
    return subprocess.run(
        [sys.executable, "-m", "fedspeed", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


def test_an_audit_of_real_updates(workshop):
    """The rounds are few: benchmarks/linkage.py measures the figures, this test checks that the parts fit
    together.
    """
    done = fedspeed(
        "audit",
        "--config",
        str(workshop.config),
        "federation.local_optimizer=reset",
        "federation.updates=[clip]",
        "--rounds",
        "8",
        "--values",
        "600",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["clients"], found["rounds"], found["values"]) == (3, 8, 600)
    clear, masked = found["findings"]
    assert (clear["mode"], masked["mode"]) == ("mix", "mix+mask") and clear["games"] == masked["games"] == 7
    best = {finding["mode"]: max(row[2] for row in finding["rows"]) for finding in found["findings"]}
    assert best["mix"] > 0.5 and all(
        finding["even"] and finding["traced"] == 0.0 for finding in found["findings"]
    )
    assert [lies["mode"] for lies in found["lies"]] == ["mix", "mix+mask"]
    for lies in found["lies"]:
        assert lies["liars"] == [0] and len(lies["attacks"]) > 10 and len(lies["headers"]) > 5
        assert all(result["limit"] for result in (*lies["attacks"], *lies["headers"]) if result["succeeded"])
    assert 0.0 < found["loss"]["correlation"] <= found["loss"]["highest"] <= 1.0


@pytest.mark.slow
def test_a_coalition_with_all_relays_follows_every_cell(workshop):
    """It holds for every method; here the sums are of products of factors."""
    done = fedspeed(
        "audit",
        "--config",
        str(workshop.config),
        "federation.local_optimizer=reset",
        "federation.method=flexlora",
        "federation.server_optimizer=none",
        "federation.server_lr=1",
        "--rounds",
        "2",
        "--values",
        "300",
        "--modes",
        "mix+mask",
        "--relays",
        "0,1,2",
    )
    assert done.returncode == 0, done.stderr
    assert "cells traced from their source by the coalition's relays: 1.000 (formula 1.000)" in done.stdout
    assert "no lies are played" in done.stdout  # nobody is honest


@pytest.mark.parametrize(
    "arguments,named",
    [
        (("--modes", "plane"), "--modes: plane is none of plain, mix, mask, mix+mask"),
        (("data.clients=2",), "at least 3 clients"),
        (("--relays", "0,9"), "no client 9"),
        (("--rounds", "0"), "is not a whole number of at least 1"),
    ],
)
def test_what_cannot_be_audited(workshop, arguments, named):
    done = fedspeed("audit", "--config", str(workshop.config), *arguments)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr


def test_keys_are_made_shown_and_signed(tmp_path):
    cards = []
    for i in range(3):
        made = fedspeed("keys", "new", f"site{i}", "--address", f"host{i}:2430{i}", "--out", str(tmp_path))
        assert made.returncode == 0 and f"site{i}.key: keep it on this site" in made.stdout
        cards.append(str(tmp_path / f"site{i}.json"))
        shown = {
            fedspeed("keys", "show", str(tmp_path / f"site{i}.{kind}")).stdout for kind in ("json", "key")
        }
        assert len(shown) == 1 and len(shown.pop().strip()) == 64
    signed = fedspeed(
        "keys",
        "roster",
        *cards,
        "--signer",
        str(tmp_path / "site0.key"),
        "--out",
        str(tmp_path / "roster.json"),
    )
    assert (
        signed.returncode == 0
        and "3 members" in signed.stdout
        and "every site pins routing.roster_signer=" in signed.stdout
    )
    signer = fedspeed("keys", "show", cards[0]).stdout.strip()
    shown = fedspeed("keys", "show", str(tmp_path / "roster.json")).stdout
    assert "  2  site2  host2:24302  " in shown and f"signed by {signer};" in shown
    (tmp_path / "changed.json").write_text((tmp_path / "roster.json").read_text().replace("host2", "host9"))
    for arguments in (
        ("keys", "show", str(tmp_path / "nosuch.json")),
        ("keys", "show", str(tmp_path / "changed.json")),
        ("keys", "roster", cards[0], cards[0], "--signer", str(tmp_path / "site0.key")),
        ("keys", "new", "site0", "--address", "host:1", "--out", str(tmp_path)),
        ("keys", "new", "x", "--address", "nowhere"),
    ):
        done = fedspeed(*arguments)
        assert (
            done.returncode == 2
            and done.stderr.startswith("fedspeed: error: ")
            and "Traceback" not in done.stderr
        )

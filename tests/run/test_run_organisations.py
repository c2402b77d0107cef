"""One participant per organisation: separate processes with separate folders that share only a roster."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess

import pytest

from fedspeed.config.load import load
from fedspeed.errors import FedSpeedError
from fedspeed.session import preflight
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.processes import free_port
from tests.run.launched import COLD, journal_rounds, records, rounds_seen
from tests.run.sites import Federation
from tests.run.test_run_resume import SLOW

SLOW_SENDS = {
    "TEST_SLOW_SENDS_S": "0.2"
}  # a site that ends without waiting for what it has sent is found out


@pytest.fixture(scope="module")
def three(shared_workshop):
    """Return three sites and how their run ended. Their separate interpreters hash and draw differently."""
    federation = Federation(shared_workshop, "three", 3)
    return federation, [started.wait() for started in federation.start_sites(launcher=COLD)]


def test_three_sites_train_one_adapter(three):
    federation, ended = three
    assert [e.code for e in ended] == [0, 0, 0], "\n".join(e.text for e in ended)
    adapters = {(federation.run(i) / "adapter" / "adapter_model.safetensors").read_bytes() for i in range(3)}
    assert len(adapters) == 1
    found = [records(federation.run(i)) for i in range(3)]
    for rounds in found:
        assert [(r["clients"], r["received"]) for r in rounds] == [(0, 0)] + 4 * [(3, 3)]
        assert rounds[-1]["val_loss"] == found[0][-1]["val_loss"] < rounds[0]["val_loss"]


def test_nothing_of_another_site_is_in_a_sites_files(three):
    """The rows of a site occur in no other site's output, and its numbers only in its own
    (tests/run/test_run_masked.py reads the other files). Names are in the roster and are printed while a site
    is awaited.
    """
    federation, ended = three
    for i in range(3):
        said = [
            line for line in ended[i].text.splitlines() if not line.startswith("fedspeed: waiting for site")
        ]
        texts = [path.read_bytes() for path in federation.run(i).rglob("*") if path.is_file()] + [
            "\n".join(said).encode()
        ]
        for other in range(3):
            if other != i:
                assert not any(re.search(rf"say {other}\d\d\d|site{other}".encode(), text) for text in texts)


def test_lost_rows_are_reported_as_a_sum_and_to_the_site_they_belong_to(three):
    federation, ended = three
    for i in range(3):
        for text in (ended[i].err, (federation.run(i) / "report.md").read_text()):
            assert "151 rows: 150 kept, 0 of them cut" in text and "; 1 lost" in text
            assert ("this site's own are 61 rows: 60 kept, 0 of them cut; 1 lost" in text) == (i == 2)


def test_sites_that_mean_different_runs_are_reported_before_training(three):
    federation = three[0]
    started = [
        federation.workshop.start_run(
            *arguments, "run.name=differing", config=federation.config(i), env=SLOW_SENDS
        )
        for i, arguments in enumerate([
            (),
            ("train.lr=0.1", "checkpoint.every=2", "routing.step_deadline_s=60"),
            ("adapter.alpha=99", "federation.rounds=9", "federation.patience=3"),
        ])
    ]
    ended = [s.wait() for s in started]
    for i, e in enumerate(ended):
        assert e.code == 2 and "Traceback" not in e.text, e.text
        assert "the sites are about to run different things" in e.text
    for difference in (
        "train.lr: 0.003 here, 0.1 at site1",
        "checkpoint.every: 1 here, 2 at site1",
        "routing.step_deadline_s: 120.0 here, 60.0 at site1",
        "adapter.alpha: 16.0 here, 99.0 at site2",
        "federation.rounds: 4 here, 9 at site2",
        "federation.patience: 0 here, 3 at site2",
    ):
        assert difference in ended[0].text, ended[0].text
    assert not any((federation.folder / f"runs{i}" / "differing" / "journal").exists() for i in range(3))


def test_a_site_with_another_base_model_is_refused(three, tmp_path):
    import shutil

    federation = three[0]
    other = shutil.copytree(federation.workshop.folder / "model", tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    arguments = [
        ("run.name=otherbase",),
        ("run.name=otherbase",),
        ("run.name=otherbase", f"model.base={other}"),
    ]
    ended = [federation.workshop.start_run(*w, config=federation.config(i)) for i, w in enumerate(arguments)]
    for e in (s.wait() for s in ended):
        assert e.code == 2 and "the base model's files: " in e.text


@pytest.mark.parametrize(
    "key,value,named",
    [
        ("identity", "", "routing.identity is empty"),
        ("roster", "/nosuch/roster.json", "/nosuch/roster.json: cannot be read"),
        ("roster_signer", "00" * 32, "pin the key of who runs the federation"),
        ("identity", "OPERATOR", "is in no card of the roster"),
    ],
)
def test_what_is_wrong_with_a_sites_files_is_reported_at_once(three, key, value, named):
    federation = three[0]
    value = str(federation.folder / "keys" / "operator.key") if value == "OPERATOR" else value
    ended = federation.workshop.run("--dry-run", config=federation.config(0, **{key: value}))
    assert ended.code == 2 and named in ended.text and "Traceback" not in ended.text


def test_a_port_in_use_is_reported_before_anything_starts(three):
    federation = three[0]
    config = federation.config(0)
    preflight.check(load(config, []), None)
    with (
        socket.create_server(("127.0.0.1", federation.ports[0])),
        pytest.raises(FedSpeedError, match="site0's card in .*: Address already in use"),
    ):
        preflight.check(load(config, []), None)


def test_a_stranger_at_the_port_changes_nothing(three, shared_workshop):
    federation = Federation(shared_workshop, "knocked", 3)
    started = federation.start_sites(env=SLOW)
    federation.until_a_round(started)
    for sent in (b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000)):
        for port in federation.ports:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as stranger,
                contextlib.suppress(ConnectionError),
            ):
                stranger.sendall(sent)
    ended = [s.wait() for s in started]
    assert [e.code for e in ended] == [0, 0, 0], "\n".join(e.text for e in ended)
    assert all(1 <= e.err.count("refused a connection from 127.0.0.1") <= 3 for e in ended)
    for rounds, expected in zip(
        (records(federation.run(i)) for i in range(3)), (records(three[0].run(i)) for i in range(3))
    ):
        assert rounds[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=1e-3)


def test_survivors_go_on_without_a_killed_site(shared_workshop):
    """A sum needs three of the four sites. The fourth can return at the next start, with a newer roster."""
    federation = Federation(shared_workshop, "four", 4)
    started = federation.start_sites("federation.rounds=6", env=SLOW)
    federation.until_a_round(started)
    os.kill(started[3].local_ranks()[0], signal.SIGKILL)
    ended = [s.wait() for s in started]
    assert [e.code for e in ended[:3]] == [0, 0, 0], "\n".join(e.text for e in ended)
    assert ended[3].code != 0
    rounds = records(federation.run(0))
    counts = [r["received"] for r in rounds]
    assert counts[1] == 4 and counts[-1] == 3 and len({e.code for e in ended[:3]}) == 1
    assert (
        len({(federation.run(i) / "adapter" / "adapter_model.safetensors").read_bytes() for i in range(3)})
        == 1
    )


@pytest.mark.slow
def test_below_the_least_number_it_stops_and_the_same_commands_resume(three, shared_workshop):
    federation = Federation(shared_workshop, "stopped", 3)
    started = federation.start_sites(env=SLOW)
    federation.until_a_round(started)
    os.kill(started[1].local_ranks()[0], signal.SIGKILL)
    ended = [s.wait() for s in started]
    for i in (0, 2):
        assert ended[i].code == 75, ended[i].text
        assert "2 of 3 participants are left, fewer than the 3 that a sum needs" in ended[i].text
    assert max(journal_rounds(federation.run(0))) < 4
    again = [s.wait() for s in federation.start_sites()]
    assert [e.code for e in again] == [0, 0, 0], "\n".join(e.text for e in again)
    rounds = records(federation.run(0))
    assert [r["round"] for r in rounds] == [0, 1, 2, 3, 4]
    assert rounds[-1]["val_loss"] == pytest.approx(records(three[0].run(0))[-1]["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_members_leave_and_join_with_a_newer_roster(three):
    """It continues from the journal of the members that stay; a new member receives the state from them."""
    federation = three[0]
    arguments = ("run.name=changing", "federation.rounds=2")
    assert all(s.wait().code == 0 for s in federation.start_sites(*arguments))
    port = free_port()
    federation.run_keys(
        "new", "site3", "--address", f"127.0.0.1:{port}", "--out", str(federation.folder / "keys3")
    )
    (federation.folder / "rows3.jsonl").write_text((federation.folder / "rows0.jsonl").read_text())
    federation.sign(
        2, [federation.cards[0], federation.cards[2], str(federation.folder / "keys3" / "site3.json")]
    )
    try:
        ended = [
            s.wait()
            for s in federation.start_sites("run.name=changing", "federation.rounds=4", sites=(0, 2, 3))
        ]
        assert [e.code for e in ended] == [0, 0, 0], "\n".join(e.text for e in ended)
        assert [r["round"] for r in records(federation.folder / "runs0" / "changing")] == [0, 1, 2, 3, 4]
        assert [r["round"] for r in records(federation.folder / "runs3" / "changing")] == [3, 4]
        adapters = {
            (
                federation.folder / f"runs{i}" / "changing" / "adapter" / "adapter_model.safetensors"
            ).read_bytes()
            for i in (0, 2, 3)
        }
        assert len(adapters) == 1
    finally:
        federation.sign(1)


@pytest.mark.slow
def test_a_newer_roster_is_taken_up_between_rounds(shared_workshop):
    """While the run is in progress one site leaves, one joins and one gets a new key; one site has two ranks.
    An older roster readmits nobody.
    """
    federation = Federation(shared_workshop, "rolling", 4)
    folder = federation.folder
    federation.sign(1, federation.cards[:3])
    older = (folder / "roster.json").read_bytes()
    for i in range(3):
        (folder / f"roster{i}.json").write_bytes(older)
    arguments = ("federation.rounds=20", "cluster.max_restarts=1")
    started = [
        federation.start_sites(
            *arguments, *(["cluster.local_ranks=2"] if i == 0 else []), env=SLOW, sites=(i,)
        )[0]
        for i in range(3)
    ]
    federation.until_a_round(started)
    federation.run_keys(
        "new", "site1", "--address", f"127.0.0.1:{federation.ports[1]}", "--out", str(folder / "rotated")
    )
    federation.sign(2, [federation.cards[0], str(folder / "rotated" / "site1.json"), federation.cards[3]])
    (folder / "rotated" / "site1.key").replace(folder / "keys1" / "site1.key")
    newer = (folder / "roster.json").read_bytes()
    started += federation.start_sites(*arguments, env=SLOW, sites=(3,))
    for i, half in ((2, newer), (0, newer[: len(newer) // 2]), (0, newer)):
        (folder / f"roster{i}.json").write_bytes(half)
        seen = rounds_seen(federation.run(0))
        started[0].until(
            lambda seen=seen: rounds_seen(federation.run(0)) >= seen + 2
        )  # not before all have it
    assert not any("newer roster" in s.said() for s in started)
    (folder / "roster1.json").write_bytes(newer)
    ended = [s.wait() for s in started]
    assert [e.code for e in ended] == [0, 0, 2, 0], "\n".join(e.text for e in ended)
    assert (
        all("all sites have a newer roster" in e.err for e in ended[:3])
        and "is in no card of the roster (epoch 2)" in ended[2].err
    )
    assert [r["round"] for r in records(federation.run(0))] == list(range(21)) and records(federation.run(3))[
        -1
    ]["round"] == 20
    (folder / "roster0.json").write_bytes(older)
    for arguments in ((), ("--dry-run",)):
        again = federation.start_sites(
            "federation.rounds=22", "cluster.local_ranks=2", *arguments, sites=(0,)
        )[0].wait()
        assert again.code == 2 and "its epoch 1 is older than 2" in again.text


@pytest.mark.slow
def test_the_example_runs_as_written():
    done = subprocess.run(
        ["bash", "launchers/organisations.sh", "--fresh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished: 8 of 8 rounds") == 3

"""Whole runs with the model divided over ranks: they train as runs with whole models do, and survive the loss
of a stage.
"""

import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedspeed.cluster.hostfile import parse
from fedspeed.cluster.topology import place_clients
from fedspeed.engine.checks import check_pipeline
from fedspeed.errors import ConfigError
from fedspeed.monitor.trace import read_spans
from fedspeed.routing.config import RoutingConfig
from tests.run.launched import journal_rounds, records, rounds_seen, with_overrides
from tests.run.test_run_resume import SLOW
from tests.tiny import run_config

COMMON = ("data.clients=2", "engine.tier=resident", "federation.rounds=3", "monitor.plot=false")
SHARED = ("engine.pipeline=cluster", "federation.local_optimizer=reset")


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def plain(shared_workshop):
    """Return the folders of runs with one rank a client and whole models, with and without stored optimizer
    state.
    """
    found = {}
    for kept in ("keep", "reset"):
        ended = shared_workshop.run(*COMMON, f"run.name=whole-{kept}", f"federation.local_optimizer={kept}")
        assert ended.code == 0, ended.text
        found[kept] = shared_workshop.runs / f"whole-{kept}"
    return found


@pytest.mark.parametrize(
    "name,arguments,kept",
    [
        ("client", ("engine.pipeline=client", "cluster.local_ranks=4", "cluster.ranks_per_client=2"), "keep"),
        (
            "loaded",
            (
                "engine.pipeline=client",
                "cluster.local_ranks=4",
                "cluster.ranks_per_client=2",
                "engine.tier=ram",
                "routing.mode=auto",
            ),
            "keep",
        ),
        ("cluster", SHARED, "reset"),
        (
            "masked",
            (*SHARED, "cluster.one_trust_domain=true", "routing.mode=mix+mask", "routing.min_participants=2"),
            "reset",
        ),
    ],
)
def test_a_pipeline_trains_what_whole_models_train(shared_workshop, plain, name, arguments, kept):
    ended = shared_workshop.run(
        *with_overrides(COMMON, *arguments, "monitor.plot=true"),
        f"run.name=pipelined-{name}",
        "monitor.trace_rounds=2",
    )
    assert ended.code == 0, ended.text
    run = shared_workshop.runs / f"pipelined-{name}"
    expected = adapter(plain[kept])
    found = adapter(run)
    assert found.keys() == expected.keys()
    assert max(np.abs(found[n] - expected[n]).max() for n in found) < (1e-4 if name != "masked" else 2e-2)
    traced = read_spans(run)
    assert len(traced) == len(list((run / "trace").iterdir())) == (2 if "cluster" in arguments[0] else 4)
    for spans in traced.values():
        kinds = {kind for kind, *_ in spans}
        assert {"compute", "wait", "send", "step", "stage"} <= kinds and ("load" in kinds) == (
            name == "loaded"
        )
        assert any(what.startswith("backward") for _, what, *_ in spans) and all(
            0 <= begin <= end for *_, begin, end in spans
        )
    assert any(kind == "exchange" for spans in traced.values() for kind, *_ in spans)
    assert (
        (run / "timeline.png").exists()
        == (name != "masked")
        == ("timeline.png" in (run / "report.md").read_text())
    )
    assert all(0 < r["bubble"] < 1 and r["overlap"] == pytest.approx(0, abs=0.9) for r in records(run)[1:])
    for ours, theirs in zip(records(run), records(plain[kept]), strict=True):
        assert (ours["round"], ours["tokens"], ours["clients"], ours["received"]) == (
            theirs["round"],
            theirs["tokens"],
            theirs["clients"],
            theirs["received"],
        )
        for key in ("train_loss", "val_loss"):
            assert ours[key] == (
                theirs[key] and pytest.approx(theirs[key], rel=1e-4 if name != "masked" else 1e-2)
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("engine.pipeline=client", "cluster.local_ranks=4", "cluster.ranks_per_client=2"), SHARED]
)
def test_a_lost_stage_is_named_and_the_run_goes_on(shared_workshop, arguments):
    """A stage is killed with SIGKILL and the run resumes from the journal.
    tests/engine/test_engine_pipeline.py tests each instruction.
    """
    name = f"lost-{arguments[0][-6:]}"
    started = shared_workshop.start_run(
        *with_overrides(COMMON, *arguments, "federation.rounds=6"), f"run.name={name}", env=SLOW
    )
    run = shared_workshop.runs / name
    started.until(lambda: rounds_seen(run) >= 2)
    os.kill(started.local_ranks()[1], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 0, ended.text
    assert "starting all ranks again from the journal" in ended.err and max(journal_rounds(run)) == 6
    assert [r["round"] for r in records(run)] == list(range(7))


@pytest.mark.parametrize(
    "arguments,text",
    [
        (
            ("engine.pipeline=client", "cluster.local_ranks=2"),
            "client 0 has one rank, and a pipeline needs two",
        ),
        ((*SHARED, "cluster.local_ranks=1"), "has one rank, and a pipeline needs two"),
        ((*SHARED, "routing.mode=mix+mask", "routing.min_participants=2"), "cluster.one_trust_domain=true"),
        (("engine.cuts=[1]",), "engine.pipeline=none"),
        ((*SHARED, "engine.cuts=[7]"), "engine.cuts=[7]: write auto, or 1 ascending numbers"),
        ((*SHARED, "cluster.local_ranks=9"), "so take fewer ranks"),
        (("engine.pipeline=client", "engine.cuts=[1]", "engine.tier=ram"), "leave engine.cuts out"),
        ((*SHARED, "adapter.method=full", "adapter.dropout=0"), "adapter.method=full"),
        ((*SHARED, "engine.tier=ram"), "set engine.tier=resident"),
        (("engine.pipeline=cluster",), "federation.local_optimizer=reset"),
    ],
)
def test_what_a_pipeline_cannot_do_is_reported_before_it_starts(shared_workshop, arguments, text):
    ended = shared_workshop.run("data.clients=2", *arguments, "--dry-run")
    assert ended.code == 2 and text in ended.err and "Traceback" not in ended.text


@pytest.mark.parametrize(
    "trust,declared,mode,refused",
    [
        ("shared", False, "mix+mask", False),
        ("separate", False, "mix+mask", True),
        ("separate", True, "mix+mask", False),
        ("separate", False, "plain", False),
    ],
)
def test_clients_of_a_cluster_declare_their_trust_in_the_hostfile_or_the_configuration(
    trust, declared, mode, refused
):
    hosts = parse(
        f"a slots=1\nb slots=1\n# fed-cluster near trust={trust}\n# fed-host a cluster=near\n# fed-host b "
        "cluster=near\n",
        "hosts",
    )
    config = run_config(
        model={"base": "gpt3-125m"}, engine={"pipeline": "cluster"}, cluster={"one_trust_domain": declared}
    )
    expectation = (
        pytest.raises(ConfigError, match="cluster near trust each other.*`# fed-cluster near trust=shared`")
        if refused
        else nullcontext()
    )
    with expectation:
        check_pipeline(config, {}, RoutingConfig(mode=mode), place_clients(hosts.hosts, 2, "auto"), hosts)

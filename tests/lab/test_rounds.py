"""Federated rounds as users start them: by DeepSpeed's launchers over the hosts of a virtual cluster, and as
a Slurm job.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests.lab import slurm
from tests.lab.cluster import VirtualCluster, why_not
from tests.limits import LIMIT_S

ROOT = Path(__file__).parents[2]
on_virtual_hosts = pytest.mark.skipif(why_not() is not None, reason=f"virtual cluster: {why_not()}")

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


@pytest.fixture
def config(tmp_path):
    """A tiny run: random base, built-in task, ZeRO-3 with the base partitioned over each cluster."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    path = tmp_path / "run.yaml"
    path.write_text(f"""
run: {{out: {tmp_path}/runs}}
model: {{base: {tmp_path}, init: random, dtype: fp32, tokenizer: bytes}}
data: {{task: builtin, clients: 3, max_tokens: 64, max_rows: 600}}
train: {{local_steps: 2, micro_batch: 4}}
federation: {{rounds: 2}}
routing: {{mode: plain}}
monitor: {{plot: false}}
deepspeed: {{base: zero3.json}}
""")
    return path


def hostfile(folder: Path, *hosts: tuple[str, int, str]) -> Path:
    path = folder / "hosts"
    path.write_text(
        "".join(
            f"{name} slots={slots}\n# fed-host {name} cluster={cluster}\n" for name, slots, cluster in hosts
        )
    )
    return path


def deepspeed(hosts: Path) -> list[str]:
    return ["deepspeed", "--hostfile", str(hosts)]


def launch(hosts: Path, config: Path) -> list[str]:
    return ["launch.py", "--hostfile", str(hosts), "--config", str(config)]


def check(config: Path, rounds: int, clients: int, ranks: int) -> str:
    run = config.parent / "runs" / config.stem
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [r["round"] for r in records] == list(range(rounds + 1))
    assert all(r["received"] == r["clients"] == clients for r in records[1:])
    assert records[-1]["val_loss"] < records[0]["val_loss"]
    report = (run / "report.md").read_text()
    assert "Finished" in report and f"{ranks} ranks" in report
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    return report


@on_virtual_hosts
@pytest.mark.parametrize("launcher", ["pdsh", pytest.param("openmpi", marks=pytest.mark.slow)])
def test_three_hosts_in_two_clusters(config, tmp_path, launcher):
    """Two clusters that never share a torch world, one of them over two hosts, and a client of two ranks on
    each host.
    """
    hosts = hostfile(tmp_path, ("alpha", 2, "fast"), ("beta", 2, "fast"), ("gamma", 2, "slow"))
    with VirtualCluster(hosts) as lab:
        done = lab.run(
            [
                *deepspeed(hosts),
                "--launcher",
                launcher,
                *launch(hosts, config),
                "train.local_steps_by_cluster.slow=1",
            ],
            timeout=LIMIT_S,
            cwd=ROOT,
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "2 clusters" in check(config, 2, 3, 6)


@pytest.mark.slow
@on_virtual_hosts
def test_a_lost_host_is_no_success(config, tmp_path):
    hosts = hostfile(tmp_path, ("alpha", 1, "fast"), ("gamma", 1, "slow"))
    with VirtualCluster(hosts) as lab:
        command = [
            *deepspeed(hosts),
            *launch(hosts, config),
            "data.clients=2",
            "federation.rounds=500",
            "cluster.heartbeat_timeout_s=10",
        ]
        with lab.spawn(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            seen = ""
            while "round 1/500" not in seen:
                line = process.stdout.readline()
                assert line, seen[-4000:]
                seen += line
            lab.kill_host("gamma")
            process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    report = (tmp_path / "runs" / "run" / "report.md").read_text()
    assert "FAILED" in report and "client 1" in report


CLIENTS_OVER_HOSTS = ("engine.pipeline=client", "cluster.ranks_per_client=2", "monitor.trace_rounds=1")
ONE_FOR_ALL = ("engine.pipeline=cluster", "routing.mode=mix+mask")


@pytest.mark.slow
@on_virtual_hosts
@pytest.mark.parametrize(
    "ranks, clients, words",
    [(3, 3, ONE_FOR_ALL), (2, 1, CLIENTS_OVER_HOSTS), (4, 2, CLIENTS_OVER_HOSTS), (4, 4, ONE_FOR_ALL)],
)
def test_pipelines_over_hosts(config, tmp_path, ranks, clients, words):
    """Clients whose model lies over two servers each; one pipeline over all of a cluster's, whose hostfile
    says that its clients trust each other.
    """
    hosts = hostfile(tmp_path, *((name, 1, "near") for name in "abcd"[:ranks]))
    hosts.write_text(hosts.read_text() + "# fed-cluster near trust=shared\n")
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": 4}))
    with VirtualCluster(hosts) as lab:
        done = lab.run(
            [
                *deepspeed(hosts),
                *launch(hosts, config),
                "deepspeed.base=pipeline.json",
                "federation.local_optimizer=reset",
                f"data.clients={clients}",
                *words,
            ],
            timeout=LIMIT_S,
            cwd=ROOT,
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    check(config, 2, clients, ranks)
    traces = tmp_path / "runs" / "run" / "trace"
    assert words is ONE_FOR_ALL or len(list(traces.iterdir())) == ranks


@pytest.mark.slow
@on_virtual_hosts
def test_hetero10(config):
    """The mission's command on its ten hosts: 10 clients of two ranks each in clusters of 14 and 6 ranks."""
    with VirtualCluster(ROOT / "hostfiles" / "hetero10") as lab:
        done = lab.run(
            [
                "deepspeed",
                "--hostfile",
                "hostfiles/hetero10",
                "launch.py",
                "--config",
                str(config),
                "data.clients=10",
            ],
            timeout=900,
            cwd=ROOT,
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "2 clusters" in check(config, 2, 10, 20)


@pytest.mark.slow
@pytest.mark.skipif(slurm.why_not() is not None, reason=f"Slurm: {slurm.why_not()}")
def test_slurm_runs_the_job_script(config, tmp_path):
    with slurm.SlurmOnOneMachine(nodes=1, cpus=4, gpus=2) as cluster:
        job = cluster.sbatch(
            ROOT / "launchers" / "slurm.sbatch",
            options=[
                "--nodes=1",
                "--ntasks-per-node=2",
                "--gpus-per-node=2",
                f"--output={tmp_path}/slurm.out",
            ],
            env={"CONFIG": str(config), "DS_ACCELERATOR": "cpu"},
            cwd=ROOT,
        )
        status = job.wait(timeout=LIMIT_S)
    assert status.state == "COMPLETED", (tmp_path / "slurm.out").read_text()[-4000:]
    check(config, 2, 3, 2)

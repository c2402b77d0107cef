"""Rounds with federation.staleness=1 over emulated hosts with limited links, with timed compute: a sleep of
fixed length in place of each local step's arithmetic, since all hosts share this machine's cores. Everything
else is real: the processes of launch.py, the round loop, the exchange, journal and records.

    python benchmarks/staleness_timed_compute.py [--rates 1gbit,100mbit] [--modes plain,mix+mask]
        [--compute-s 4] [--rounds 6]

For each link and mode there is one run without staleness and one with it. The exchange is the time that a
round of the first run waits for its sum. The goal is a ratio of at most 1.05 between a round of the second
run and max(compute, exchange). Needs root and network namespaces (docs/virtual-cluster.md).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
CLIENTS = 3
PORT = 23456
WARM = 2  # rounds that are not counted


def rank_main(compute_s: float, arguments: list[str]) -> int:
    """Run launch.py's rank with a sleep in place of every local step after the first.

    Those steps send zeros, as many bytes as a real update has.
    """
    from fedspeed.cli import main
    from fedspeed.engine import stock
    from fedspeed.engine.client_engine import Sums

    gradients = stock.StockEngine._gradients
    step = stock.StockEngine._step
    sums = []

    def timed(self, work):
        begin = time.perf_counter()
        sums.append([Sums(1.0, step.step_answer_tokens) for step in work] if sums else gradients(self, work))
        time.sleep(max(0.0, compute_s - (time.perf_counter() - begin)))
        return sums[-1]

    stock.StockEngine._gradients = timed
    stock.StockEngine._step = lambda self, slots, lr: step(self, slots, lr) if len(sums) == 1 else [True]
    return main(["run", *arguments])


@dataclass(frozen=True)
class RunSettings:
    """A run of the benchmark. `rate` of the links as `tc` reads it; `rounds` that are counted."""

    rate: str
    mode: str
    staleness: int
    compute_s: float
    rounds: int


@dataclass(frozen=True)
class RunTimes:
    """Medians over the counted rounds of a run: seconds of a round and of its exchange. `nbytes` of the
    update.
    """

    round_s: float
    exchange_s: float
    nbytes: int


def times_of(settings: RunSettings) -> RunTimes:
    """Make a run and return its times.

    Raises:
        SystemExit: a rank failed; the message has the end of each rank's output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL))
        hosts = folder / "hosts"
        hosts.write_text("".join(f"h{i} slots=1\n" for i in range(CLIENTS)))
        run_ranks_on_hosts(settings, folder, hosts)
        lines = (folder / "timed" / "rounds.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines][1 + WARM :]
        if settings.staleness:
            records = records[:-1]  # the last round only waits for its sum: nothing trains meanwhile
        return RunTimes(
            statistics.median(record["seconds"] for record in records),
            statistics.median(record["exchange_s"] for record in records),
            sum(file.stat().st_size for file in (folder / "timed" / "model").glob("*.safetensors")),
        )


def run_ranks_on_hosts(settings: RunSettings, folder: Path, hosts: Path) -> None:
    """Run one rank on each host of a virtual cluster until all have ended.

    Raises:
        SystemExit: a rank failed; the message has the end of each rank's output.
    """
    from tests.lab.cluster import VirtualCluster

    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with VirtualCluster(hosts, rate=settings.rate, env=environment) as lab:
        script = str(Path(__file__).resolve())
        arguments = arguments_of(settings, folder, hosts)
        ranks = [
            lab.spawn(
                [sys.executable, script, "rank", str(settings.compute_s), *arguments],
                host=host.name,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={
                    "RANK": str(i),
                    "WORLD_SIZE": str(CLIENTS),
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": lab.hosts[0].address,
                    "MASTER_PORT": str(PORT),
                    "GLOO_SOCKET_IFNAME": "eth0",
                    "PYTHONPATH": str(ROOT),
                },
            )
            for i, host in enumerate(lab.hosts)
        ]
        outputs = [rank.communicate(timeout=600) for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("\n".join(err[-3000:] for _, err in outputs))


def arguments_of(settings: RunSettings, folder: Path, hosts: Path) -> list[str]:
    """Return the arguments of `fedspeed run`."""
    rounds = settings.rounds + WARM
    return [
        "--config",
        str(ROOT / "ds_configs" / "quickstart.yaml"),
        f"model.base={folder}",
        "model.init=random",
        "adapter.method=full",
        f"data.clients={CLIENTS}",
        "data.max_rows=120",
        "train.local_steps=1",
        "train.micro_batch=4",
        f"federation.rounds={rounds}",
        f"federation.staleness={settings.staleness}",
        f"federation.evaluate_every={rounds}",
        "federation.compare_alone=false",
        f"routing.mode={settings.mode}",
        "engine.tier=stock",
        "monitor.plot=false",
        f"run.out={folder}",
        "run.name=timed",
        f"--hostfile={hosts}",
    ]


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        sys.exit(rank_main(float(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="1gbit,100mbit")
    parser.add_argument("--modes", default="plain,mix+mask")
    parser.add_argument("--compute-s", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    print(
        "| link | mode | update | compute | exchange | round, staleness 0 | round, staleness 1 | over "
        "max(compute, exchange) |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rate in args.rates.split(","):
        for mode in args.modes.split(","):
            settings = RunSettings(
                rate=rate, mode=mode, staleness=0, compute_s=args.compute_s, rounds=args.rounds
            )
            in_turn = times_of(settings)
            overlapped = times_of(replace(settings, staleness=1))
            ratio = overlapped.round_s / max(args.compute_s, in_turn.exchange_s)
            print(
                f"| {rate} | {mode} | {in_turn.nbytes / 1e6:.1f} MB | {args.compute_s:.2f} s | "
                f"{in_turn.exchange_s:.2f} s | {in_turn.round_s:.2f} s | {overlapped.round_s:.2f} s | "
                f"{ratio:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()

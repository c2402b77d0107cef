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


def rank_main(compute_s: float, words: list[str]) -> int:
    """launch.py, but that a local step after the first is a sleep. What it sends is as large as ever, and
    zero.
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
    return main(["run", *words])


def seconds_of(
    rate: str, mode: str, staleness: int, compute_s: float, rounds: int
) -> tuple[float, float, float]:
    """(seconds of a round, of its exchange, bytes of the update), medians over the counted rounds."""
    from tests.lab.cluster import VirtualCluster

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL))
        hosts = folder / "hosts"
        hosts.write_text("".join(f"h{i} slots=1\n" for i in range(CLIENTS)))
        words = [
            "--config",
            str(ROOT / "ds_configs" / "quickstart.yaml"),
            f"model.base={folder}",
            "model.init=random",
            "adapter.method=full",
            f"data.clients={CLIENTS}",
            "data.max_rows=120",
            "train.local_steps=1",
            "train.micro_batch=4",
            f"federation.rounds={rounds + WARM}",
            f"federation.staleness={staleness}",
            f"federation.evaluate_every={rounds + WARM}",
            "federation.compare_alone=false",
            f"routing.mode={mode}",
            "engine.tier=stock",
            "monitor.plot=false",
            f"run.out={folder}",
            "run.name=timed",
            f"--hostfile={hosts}",
        ]
        with VirtualCluster(
            hosts, rate=rate, env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        ) as lab:
            command = [sys.executable, str(Path(__file__).resolve()), "rank", str(compute_s), *words]
            started = [
                lab.spawn(
                    command,
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
            ends = [process.communicate(timeout=600) for process in started]
        if any(process.returncode for process in started):
            sys.exit("\n".join(err[-3000:] for _, err in ends))
        records = [json.loads(line) for line in (folder / "timed" / "rounds.jsonl").read_text().splitlines()][
            1 + WARM :
        ]
        if staleness:
            records = records[:-1]  # the last round is only settled: nothing trains meanwhile
        nbytes = sum(f.stat().st_size for f in (folder / "timed" / "model").glob("*.safetensors"))
        return (
            statistics.median(r["seconds"] for r in records),
            statistics.median(r["exchange_s"] for r in records),
            nbytes,
        )


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
            apart, exchange, nbytes = seconds_of(rate, mode, 0, args.compute_s, args.rounds)
            beside, _, _ = seconds_of(rate, mode, 1, args.compute_s, args.rounds)
            print(
                f"| {rate} | {mode} | {nbytes / 1e6:.1f} MB | {args.compute_s:.2f} s | {exchange:.2f} s | "
                f"{apart:.2f} s | {beside:.2f} s | "
                f"{beside / max(args.compute_s, exchange):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()

"""Real runs, a process for each client, and what a client needs in one round of them."""

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.processes import cpu_seconds, processes_with, proportional, resident, watch
from benchmarks.compare.results import ROOT
from fedspeed.errors import FedSpeedError

HOSTFILE = "hostfiles/scale16"
HOSTS_CLIENTS = 16
LORA_RANK = 32
STEPS = 10
ROWS = 4
LIMIT_S = 900
SOME = 3  # processes whose memory is looked at: the kernel walks all pages of each
LAUNCHERS = ("tests.lab", "deepspeed", "pdsh", "ssh")  # what else has the run's name in its command
ROUND = re.compile(r'"event": "round", "round": (\d+)')  # a line of --json
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


def write_config(folder: Path) -> Path:
    """Write the run's configuration and its base's; return the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    path = folder / "scale.yaml"
    path.write_text(f"""
run: {{out: {folder}/runs}}
model: {{base: {folder}, init: random, dtype: fp32, tokenizer: bytes}}
adapter: {{lora_rank: {LORA_RANK}, alpha: {LORA_RANK}, targets: all-linear}}
data: {{task: builtin, split: iid, max_tokens: 64, val_fraction: 0.1, max_val_rows: 16}}
train: {{local_steps: {STEPS}, micro_batch: {ROWS}, lr: 5e-3}}
monitor: {{plot: false}}
deepspeed: {{base: zero0.json}}
""")
    return path


def rounds_of(clients: int) -> int:
    """Return the rounds of a run: more where they are short."""
    return max(3, min(9, 96 // clients))


class Samples:
    """What the processes of a run have used when a round's line was seen.

    Attributes:
        taken: by round, (seconds, CPU-seconds of main threads, of others, bytes on all hosts' links).
        pss, rss: bytes of a client process after the first round, means over some.
    """

    def __init__(self, word: str):
        """Look at processes with this word among their arguments."""
        self._word = word
        self.taken: dict[int, tuple[float, float, float, int]] = {}
        self.pss = 0.0
        self.rss = 0.0

    def seen(self, line: str) -> None:
        """Take a sample if the line ends a round."""
        if not (match := ROUND.search(line)):
            return
        number = int(match[1])
        found = processes_with(self._word, LAUNCHERS)
        first, others = cpu_seconds(found)
        self.taken.setdefault(number, (time.perf_counter(), first, others, link_bytes(found)))
        if number == 1:
            some = sorted(found, key=lambda process: int(process.name))[-SOME:]  # the first is the starter
            self.pss = proportional(some) / max(1, len(some))
            self.rss = resident(some) / max(1, len(some))


def link_bytes(found: Sequence[Path]) -> int:
    """Return the bytes that the network namespaces of some processes have sent through `eth0`."""
    sent: dict[str, int] = {}
    for process in found:
        try:
            space = os.readlink(process / "ns" / "net")
            if space not in sent:
                table = (process / "net" / "dev").read_text().splitlines()
                own = [line.split(":")[1].split() for line in table if line.strip().startswith("eth0:")]
                sent[space] = int(own[0][8]) if own else 0
        except OSError:  # it has ended
            continue
    return sum(sent.values())


def command_of(config: Path, clients: int, mode: str, name: str, *, rounds: int, hosts: bool) -> list[str]:
    """Return the command of a run."""
    words = [
        *(f"{key}={value}" for key, value in (("data.clients", clients), ("run.name", name))),
        f"federation.rounds={rounds}",
        f"routing.mode={mode}",
        f"data.max_rows={max(600, 60 * clients)}",
    ]
    if not hosts:
        local = f"cluster.local_ranks={clients}"
        return [sys.executable, "launch.py", "--config", str(config), "--fresh", "--json", *words, local]
    lab = [sys.executable, "-m", "tests.lab", "run", HOSTFILE, "--", "deepspeed", "--hostfile", HOSTFILE]
    return [*lab, "launch.py", "--hostfile", HOSTFILE, "--config", str(config), "--fresh", "--json", *words]


def measure(folder: Path, clients: int, mode: str, *, hosts: bool) -> dict[str, Any]:
    """Run, and return what a client needed in one round, all rounds but the first together.

    Args:
        hosts: on the hosts of scale16, instead of processes of one machine.

    Raises:
        FedSpeedError: the run failed.
    """
    name = f"scale-{clients}-{mode.replace('+', '-')}{'-hosts' * hosts}-{os.getpid()}"
    config = write_config(folder)
    rounds = rounds_of(clients)
    command = command_of(config, clients, mode, name, rounds=rounds, hosts=hosts)
    samples = Samples(f"run.name={name}")
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = watch(command, cwd=ROOT, env=env, limit_s=LIMIT_S, seen=samples.seen, has_memory=False)
    if done.code != 0 or not set(range(1, rounds + 1)) <= samples.taken.keys():
        raise FedSpeedError(f"{' '.join(command)}: exit code {done.code}\n{done.errors}")
    run = folder / "runs" / name
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    values = point(records[2:], samples, clients)
    if not (samples.pss and values["busy_cores"]):
        raise FedSpeedError(f"{' '.join(command)}: its processes had ended before they were looked at")
    losses = [record["train_loss"] for record in records[1:]]
    return values | {
        **({} if hosts else {"link_bytes": None}),
        "kind": "hosts" if hosts else "processes",
        "mode": mode,
        "update_bytes": update_bytes(run / "adapter" / "adapter_model.safetensors"),
        "whole_s": done.seconds,
        "losses": losses,
        "command": " ".join(word.replace(str(ROOT) + "/", "") for word in command[1:]),
    }


def point(records: Sequence[dict], samples: Samples, clients: int) -> dict[str, Any]:
    """Return the figures of a client and round, from the rounds' records and from samples of all rounds."""
    # Not the last round: when its line is seen, ranks may have ended.
    first, *_, last, _ = sorted(samples.taken.keys() - {0})
    begin = samples.taken[first]
    end = samples.taken[last]
    rounds = last - first
    share = clients * rounds
    elapsed, main, others, link = (b - a for a, b in zip(begin, end, strict=True))
    stages = ("seconds", "compute_s", "exchange_s", "idle_s")
    return {
        "clients": clients,
        **{name: statistics.median(record[name] for record in records) for name in stages},
        "bytes_sent": statistics.median(record["bytes_sent"] for record in records) / clients,
        "link_bytes": link / share,
        "cpu_training_s": main / share,
        "cpu_exchange_s": others / share,
        "busy_cores": (main + others) / elapsed,
        "pss": samples.pss,
        "rss": samples.rss,
    }


def update_bytes(adapter: Path) -> int:
    """Return the bytes of an adapter's tensors in fp32, which is what a client sends as its update."""
    from safetensors import safe_open

    with safe_open(adapter, "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    return 4 * sum(a * b for a, b in shapes)

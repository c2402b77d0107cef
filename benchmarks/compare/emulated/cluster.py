"""Runs of the real program on virtual hosts with limited links (tests/lab), with timed compute."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.emulated.engine_files import MARKS_FOLDER, SECONDS_FILE
from benchmarks.compare.emulated.plans import Plan
from benchmarks.compare.results import ROOT
from fedspeed.cluster.hostfile import Host
from fedspeed.errors import ConfigError, FedSpeedError
from fedspeed.models.families.shape import ModelShape
from fedspeed.units import bytes_text

LAUNCH = ROOT / "benchmarks" / "compare" / "emulated" / "launch.py"
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
WARM = 1  # rounds that are not counted: connections, first allocations
LIMIT_S = 1500.0  # of a run
START_S = 90.0  # that a run takes besides its rounds, for the expected time
WORD = "word "  # of rows, a byte is a token
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Measured:
    """What one emulated run has taken; medians over its counted rounds.

    Attributes:
        round, exchange, idle, compute: seconds of a round, means over the ranks.
        sent, received: by host, bytes a round at its network interface. cpu: seconds of all ranks together in
            a round, which they spend on this machine's cores.
        counted: bytes that the program says all ranks have sent in a round.
        rounds: that were counted.
    """

    round: float
    exchange: float
    idle: float
    compute: float
    sent: dict[str, float]
    received: dict[str, float]
    cpu: float
    counted: float
    rounds: int


def run_of(plan: Plan, hosts: Sequence[Host], *, rounds: int, time_scale: float, launcher: str) -> Measured:
    """Make a run, and return what it has taken.

    Args:
        hosts: with their facts. time_scale: multiplies the sleeps; links are as much slower.
        launcher: of DeepSpeed, as pdsh or openmpi.

    Raises:
        FedSpeedError: it failed; the message has the end of its output.
    """
    from tests.lab.cluster import VirtualCluster

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hostfile = write_inputs(plan, hosts, folder, time_scale)
        gbps = min(host.link_gbps or 10.0 for host in hosts) / time_scale
        environment = ENVIRONMENT | {SECONDS_FILE: f"{folder}/seconds.json", MARKS_FOLDER: f"{folder}/marks"}
        command = ["deepspeed", "--hostfile", str(hostfile), "--launcher", launcher, str(LAUNCH)]
        arguments = arguments_of(plan, folder, hostfile, rounds)
        with VirtualCluster(hostfile, rate=f"{gbps:g}gbit", env=environment) as lab:
            print(f"  links of {gbps:g} Gbit/s, update {bytes_text(4 * plan.values)}", file=sys.stderr)
            try:
                done = lab.run([*command, *arguments], timeout=LIMIT_S, cwd=ROOT)
            except subprocess.TimeoutExpired as late:
                raise FedSpeedError(
                    f"{plan.way}: not finished within {LIMIT_S:.0f} s\n{str(late.stdout)[-3000:]}"
                ) from late
        records = folder / "emulated" / "rounds.jsonl"
        if done.returncode or not records.is_file():
            output = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            raise FedSpeedError(f"{plan.way}: exit code {done.returncode}\n{output}")
        lines = [json.loads(line) for line in records.read_text().splitlines()]
        marks = {path.stem: json.loads(path.read_text()) for path in (folder / "marks").glob("*.json")}
    if plan.simulated.staleness:
        # The last round only waits for its sum. An exchange lies across the beginnings of two rounds, so that
        # few of these do not tell what one exchange sends.
        return measured(lines[:-1], {}, loads=rounds)
    return measured(lines, marks, loads=rounds)


def measured(
    records: Sequence[Mapping[str, Any]], marks: Mapping[str, Sequence[Mapping[str, float]]], loads: int
) -> Measured:
    """Return the medians of a run's records, and what its ranks have marked at the beginning of their turns.

    Args:
        records: of rounds.jsonl, round 0 first. marks: by rank; as many in every round. loads: rounds.
    """
    counted = [record for record in records if record["round"] > WARM]
    spans = {name: _a_round(of_rank, loads) for name, of_rank in marks.items() if len(of_rank) > loads // 2}
    return Measured(
        statistics.median(record["seconds"] for record in counted),
        statistics.median(record["exchange_s"] for record in counted),
        idle=statistics.median(record["idle_s"] for record in counted),
        compute=statistics.median(record["compute_s"] for record in counted),
        sent={name: span["tx"] for name, span in spans.items()},
        received={name: span["rx"] for name, span in spans.items()},
        cpu=sum(span["cpu"] for span in spans.values()),
        counted=statistics.median(record["bytes_sent"] for record in counted),
        rounds=len(counted),
    )


def _a_round(marks: Sequence[Mapping[str, float]], rounds: int) -> dict[str, float]:
    """Return what a rank has taken in a round, between its first marks of round 2 and of the last round."""
    per_round = len(marks) // rounds
    first = marks[WARM * per_round]
    last = marks[(rounds - 1) * per_round]
    return {key: (last[key] - first[key]) / (rounds - 1 - WARM) for key in first}


def write_inputs(plan: Plan, hosts: Sequence[Host], folder: Path, time_scale: float) -> Path:
    """Write the base without weights, rows of the full length, sleeps and the hostfile, whose path is
    returned.
    """
    (folder / "marks").mkdir()
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(config_of(plan.case.shape)))
    rows = plan.case.clients * max(8, 2 * plan.micro_batch * plan.accumulation)
    text = WORD * (plan.case.tokens // len(WORD) + 1)
    lines = "".join(f"{json.dumps({'instruction': f'row {row}', 'output': text})}\n" for row in range(rows))
    (folder / "rows.jsonl").write_text(lines)
    (folder / "public.jsonl").write_text(lines)
    sleeps = {host: vars(seconds.scaled(time_scale)) for host, seconds in plan.sleeps.items()}
    (folder / "seconds.json").write_text(json.dumps(sleeps))
    path = folder / "hosts"
    path.write_text("\n".join(hostfile_lines(plan, hosts)) + "\n")
    return path


def hostfile_lines(plan: Plan, hosts: Sequence[Host]) -> Iterator[str]:
    """Yield the lines of a hostfile of the hosts that take part, with one rank each."""
    for name in plan.hosts:
        yield f"{name} slots=1"
    has_server = len(plan.hosts) > plan.case.clients
    for host in hosts:
        if host.name in plan.hosts:
            role = " role=server" if has_server and host.name == plan.hosts[0] else ""
            yield f"# fed-host {host.name} cluster={host.cluster} link_gbps={host.link_gbps or 10:g}{role}"


def arguments_of(plan: Plan, folder: Path, hostfile: Path, rounds: int) -> list[str]:
    """Return the arguments of `fedspeed run`. What a preset says of memory and of rounds is overridden, since
    the simulated outcome has the first, and the comparison fixes the second.
    """
    own = plan.method == "lora_average"
    mode = "mix+mask" if plan.way in ("fedspeed", "fedspeed, staleness 1") else "plain"
    public = [f"federation.public_rows={folder}/public.jsonl"] if plan.method == "fedbiot" else []
    return [
        "--config",
        str(ROOT / "ds_configs" / "quickstart.yaml"),
        f"--hostfile={hostfile}",
        f"federation.method.name={plan.method}",
        f"model.base={folder}/base",
        "model.init=random",
        "model.tokenizer=bytes",
        "model.dtype=bf16",
        "adapter.lora_rank=8",
        "adapter.targets=attention",
        "adapter.dropout=0",
        "data.task=file",
        f"data.path={folder}/rows.jsonl",
        "data.split=iid",
        f"data.clients={plan.case.clients}",
        f"data.max_tokens={plan.case.tokens}",
        f"train.local_steps={plan.local_steps}",
        f"train.micro_batch={plan.micro_batch}",
        f"train.accumulation={plan.accumulation}",
        f"federation.rounds={rounds}",
        f"federation.staleness={int(plan.way == 'fedspeed, staleness 1')}",
        "federation.round_budget=steps",
        f"federation.evaluate_every={rounds}",
        "federation.compare_alone=false",
        f"routing.mode={mode}",
        *(["engine.tier=resident"] if own else []),
        *public,
        *plan.case.settings,
        "monitor.plot=false",
        "monitor.progress=false",
        f"run.out={folder}",
        "run.name=emulated",
    ]


def config_of(shape: ModelShape) -> dict[str, Any]:
    """Return the config.json of a Llama-shaped model of these dimensions.

    Raises:
        ConfigError: its family is another one.
    """
    if shape.family not in ARCHITECTURES:
        raise ConfigError(
            f"--model={shape.name}: is of the family {shape.family}; models of {' and '.join(ARCHITECTURES)} "
            "are emulated"
        )
    return {
        "model_type": shape.family,
        "architectures": [ARCHITECTURES[shape.family]],
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 8192,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 256,
    }

"""Pipelines over emulated hosts with limited links, with timed compute: a sleep of fixed length in place of
each block's arithmetic, since all hosts share this machine's cores. Everything else is real: processes,
DeepSpeed's pipeline engine, the instruction streams, transfers over the limited links.

    python benchmarks/pipeline_timed_compute.py bubble
        (the measured idle share compared with the schedule's formula, (P - 1) / (M + P - 1))
    python benchmarks/pipeline_timed_compute.py clients
        (all clients of a cluster in one pipeline compared with one client after the other)
    python benchmarks/pipeline_timed_compute.py simulated
        (measured seconds of a step compared with those of the simulator, on several set-ups)

Needs root and network namespaces (docs/virtual-cluster.md).
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

FORWARD_S = 0.05  # of a block; a backward pass takes twice as long
HEAD_S = 0.01
# Of a micro-batch: 1 MiB of activations in fp32.
ROWS = 8
WIDTH = 256
HIDDEN = 128
BLOCKS = 8
STEPS = 4  # measured, after one to warm up
PORT = 23456


def write_base(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 260,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        })
    )


def timed_stage(stage) -> None:
    """Sleeps in place of arithmetic; shapes, sends and the optimizer stay."""
    import torch

    from fedspeed.engine.compute.micro_batches import DeviceScore

    def empty(micro):
        return torch.zeros((*stage._tasks[micro].batch.attention_mask.shape, HIDDEN))

    def slept(seconds, micro):
        time.sleep(seconds)
        return empty(micro)

    def backward(micro, chunk, upward):
        owner = stage._tasks[micro].owner
        for b in stage._chunks[chunk]:
            for name, _ in stage.trainable[b]:
                stage.grads[owner].setdefault(name, torch.zeros_like(stage._owners[owner][name]))
        return slept(2 * FORWARD_S * len(stage._chunks[chunk]), micro)

    def head(micro, hidden):
        stage._scores[micro] = DeviceScore(torch.zeros(()), None)
        return slept(HEAD_S, micro)

    stage.embed = empty
    stage.forward = lambda micro, chunk, hidden: slept(FORWARD_S * len(stage._chunks[chunk]), micro)
    stage.backward = backward
    stage.head = head


def step_of(micros: int):
    import numpy as np

    from fedspeed.data.batches import Batch, StepBatches

    ids = np.ones((ROWS, WIDTH), dtype=np.int64)
    return StepBatches(
        [Batch(ids, ids, ids, ROWS * (WIDTH - 1)) for _ in range(micros)], micros * ROWS * (WIDTH - 1)
    )


def rank_main(base: str, scope: str, work: list[list[int]], cuts: list[int] | str) -> None:
    """One rank: training passes for each entry of `work`, the micro-batches of each client in it; prints the
    seconds and idle fractions of each pass.
    """
    import torch

    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.engine.world import join_world, leave_world, quiet
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from tests.engine.engines import ds_config
    from tests.tiny import NoClock

    torch.set_num_threads(1)
    quiet()
    join_world(120)
    rank = int(os.environ["RANK"])
    ranks = int(os.environ["WORLD_SIZE"])
    sets = [tuple(range(ranks))] if scope == "client" else [(r,) for r in range(ranks)]
    spec = EngineSpec(
        model=ModelConfig(base=base, init="random", dtype="fp32"),
        adapter=AdapterConfig(lora_rank=2, targets=("q_proj",)),
        train=TrainConfig(),
        engine=EngineConfig(pipeline=scope, tier="resident", cuts="auto" if cuts == "auto" else tuple(cuts)),
        deepspeed=ds_config("resident", "fp32"),
    )
    own = build_engine(
        spec, EngineContext(client_sets=sets, clock=NoClock(), nvme=Path(base) / f"nvme-{rank}", seed=0)
    )
    timed_stage(own._stage)
    own.load(own.state())
    found = []
    for micros in work:
        mine = micros[0] if scope == "client" else micros[rank]
        took = []
        idle = []
        for number in range(STEPS + 1):
            torch.distributed.barrier()
            own.take_bubble()
            begin = time.perf_counter()
            if mine:
                own.train_step([step_of(mine)], 0.0)
            else:
                own._idle_pass(True)  # the others' gradients
                own._idle_pass(True)  # and their step
            torch.distributed.barrier()
            if number:
                took.append(time.perf_counter() - begin)
                bubble, passed = own.take_bubble()
                idle.append(1 - (passed - bubble) / took[-1])
        found.append((took, idle))
    print(json.dumps(found), flush=True)
    leave_world()


def measure(
    ranks: int, rate: str | None, scope: str, work: list[list[int]], cuts: tuple[int, ...] | str = "auto"
) -> list[tuple[float, float]]:
    """(median seconds, mean idle fraction over ranks) of each entry of work."""
    return [
        (statistics.mean(map(statistics.median, seconds)), statistics.mean(map(statistics.median, idle)))
        for seconds, idle in passes(ranks, rate, scope, work, cuts)
    ]


def passes(
    ranks: int, rate: str | None, scope: str, work: list[list[int]], cuts: tuple[int, ...] | str = "auto"
) -> list[tuple[list[list[float]], list[list[float]]]]:
    """Seconds and idle fractions [ranks][passes] of each entry of work."""
    from tests.lab.cluster import VirtualCluster

    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder))
        hosts = Path(folder) / "hosts"
        hosts.write_text("".join(f"h{i} slots=1\n" for i in range(ranks)))
        with VirtualCluster(
            hosts, rate=rate, env={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        ) as lab:
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "rank",
                folder,
                scope,
                json.dumps(work),
                json.dumps(cuts),
            ]
            started = [
                lab.spawn(
                    command,
                    host=host.name,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={
                        "RANK": str(i),
                        "WORLD_SIZE": str(ranks),
                        "LOCAL_RANK": "0",
                        "LOCAL_SIZE": "1",
                        "MASTER_ADDR": lab.hosts[0].address,
                        "MASTER_PORT": str(PORT),
                        "GLOO_SOCKET_IFNAME": "eth0",
                        "PYTHONPATH": str(ROOT),
                    },
                )
                for i, host in enumerate(lab.hosts)
            ]
            ends = [process.communicate(timeout=500) for process in started]
    if any(process.returncode for process in started):
        sys.exit("\n".join(err for _, err in ends))
    found = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    return [([f[i][0] for f in found], [f[i][1] for f in found]) for i in range(len(work))]


def bubble() -> None:
    print(
        "| stages | micro-batches | link | idle, measured | formula | points off |\n| ---: | ---: | --- | "
        "---: | ---: | ---: |"
    )
    for stages, counts, rate in ((2, (2, 4, 8), "1gbit"), (4, (2, 4, 8, 16), "1gbit")):
        for micros, (_, idle) in zip(counts, measure(stages, rate, "client", [[m] for m in counts])):
            formula = (stages - 1) / (micros + stages - 1)
            print(
                f"| {stages} | {micros} | {rate} | {idle:.3f} | {formula:.3f} | "
                f"{100 * (idle - formula):+.1f} |"
            )


def clients() -> None:
    print(
        "| stages | clients | micro-batches each | one after the other | together | times the throughput "
        "|\n| ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for micros in (1, 2, 3):
        work = [[micros] * 4] + [[micros if c == one else 0 for c in range(4)] for one in range(4)]
        (together, _), *alone = measure(4, "1gbit", "cluster", work)
        one_by_one = sum(seconds for seconds, _ in alone)
        print(f"| 4 | 4 | {micros} | {one_by_one:.2f} s | {together:.2f} s | {one_by_one / together:.2f} |")


def simulated() -> None:
    from fedspeed.planner.pipeline.execute import execute
    from fedspeed.planner.pipeline.times import PipelineTimes
    from fedspeed.schedule.instructions import Micro
    from fedspeed.schedule.schedules import one_f_one_b, shared, taking_turns

    print(
        "| pipeline | stages | micro-batches | link | measured | simulated | off |\n| --- | ---: | ---: | "
        "--- | ---: | ---: | ---: |"
    )
    for scope, stages, micros, rate, bits, cuts in (
        ("client", 2, [4], "1gbit", 1e9, (4,)),
        ("client", 2, [4], "100mbit", 1e8, (6,)),
        ("client", 4, [8], "1gbit", 1e9, (2, 4, 6)),
        ("client", 4, [4], "100mbit", 1e8, (1, 3, 6)),
        ("cluster", 4, [2, 2, 2, 2], "1gbit", 1e9, (2, 4, 6)),
        ("cluster", 3, [3, 1, 2], "200mbit", 2e8, (3, 6)),
    ):
        ((measured, _),) = measure(stages, rate, scope, [micros], cuts)
        ends = [0, *cuts, BLOCKS]
        blocks = [b - a for a, b in zip(ends, ends[1:])]
        names = [f"h{i}" for i in range(stages)]
        times = PipelineTimes(
            [FORWARD_S * n for n in blocks],
            [2 * FORWARD_S * n for n in blocks],
            [HEAD_S] * stages,
            steps=[0.0] * stages,
            embeds=[0.0] * stages,
            nbytes=ROWS * WIDTH * HIDDEN * 4,
            hosts=names,
            rates=dict.fromkeys(names, 0.95 * bits / 8),
            local_rate=1e9,
            latency=0.001,
        )
        turns = [Micro(c, c, c) for c, _ in taking_turns(micros)]
        line = execute(
            one_f_one_b(stages, [0] * micros[0]) if scope == "client" else shared(turns, stages), times
        )
        print(
            f"| {scope} | {stages} | {'+'.join(map(str, micros))} | {rate} | {measured:.3f} s | "
            f"{line.seconds:.3f} s | {line.seconds / measured - 1:+.1%} |"
        )


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        base, scope, work, cuts = sys.argv[2:]
        rank_main(base, scope, json.loads(work), json.loads(cuts))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("bubble", "clients", "simulated"))
    {"bubble": bubble, "clients": clients, "simulated": simulated}[parser.parse_args().what]()


if __name__ == "__main__":
    main()

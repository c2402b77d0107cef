"""The predicted time of a step on a card, and the contribution of each improvement of its execution.

    python benchmarks/step_model.py

The timeline is the planner's (fedspeed/planner/step_timeline.py), with assumptions about an H100 and its bus
instead of a probe's facts: nothing in the tables was measured on a card. Shares are relative to pure
arithmetic: all blocks resident, all but the last recomputed, and nothing else.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fedspeed.models.catalogue import shape_of  # noqa: E402
from fedspeed.models.families.shape import ModelShape  # noqa: E402
from fedspeed.planner.cards import CARDS  # noqa: E402
from fedspeed.planner.hardware import GIB, Node, published_device  # noqa: E402
from fedspeed.planner.memory import kept_bytes, memory_of  # noqa: E402
from fedspeed.planner.plan import RankProfile, Setting, Task  # noqa: E402
from fedspeed.planner.step_timeline import (  # noqa: E402
    BEHIND_LOADS,
    DEVICE,
    HOST,
    INLINE,
    BlockTimes,
    StreamedBase,
    step_time,
)
from fedspeed.planner.timing import MIN_BLOCK_S  # noqa: E402
from fedspeed.schedule.loads import spread  # noqa: E402

MATRICES = 790e12  # FLOP/s of large products on an H100, of a peak of 989
ATTENTION = 450e12  # FLOP/s of fused attention
# Norms, activations and the like, as a share of the block's products and attention; 1.4 times that for their
# gradients.
ELEMENTWISE = 0.24
HEAD = 0.6 * MATRICES  # products with few rows, and the loss
ANSWERS = 0.5  # tokens that carry loss
BUS = 55e9  # bytes/s of PCIe 5 with 16 lanes
# Seconds of a step in which the card computes nothing: with hundreds of small tensors, and with two.
FIXED_NOW = 0.05
FIXED = 0.01
MODELS = {name: f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{name}" for name in ("7B", "14B")}
STEPS = (8_192, 32_768)  # tokens
MICRO_BATCH = 4_096  # tokens


@dataclass(frozen=True)
class Work:
    """One model's step on the assumed card. `tokens` of a step, in micro-batches of one row of `micro_batch`
    tokens. `launch_s`: the least that a forward and a backward of one block take, whatever its arithmetic.
    """

    shape: ModelShape
    tokens: int
    micro_batch: int = MICRO_BATCH
    bus: float = BUS
    launch_s: tuple[float, float] = (0.0, 0.0)

    @property
    def micro_batches(self) -> int:
        return self.tokens // self.micro_batch

    @property
    def times(self) -> BlockTimes:
        """Return the times of a micro-batch, without adapters, which are a hundredth of a block's work."""
        shape = self.shape
        tokens = self.micro_batch
        products = 2 * shape.block * tokens / MATRICES
        attention = 2 * tokens**2 * shape.hidden / ATTENTION  # causal: half of the scores
        forward = max((products + attention) * (1 + ELEMENTWISE), self.launch_s[0])
        gradients = max((products + 2.5 * attention) * (1 + 1.4 * ELEMENTWISE), self.launch_s[1])
        return BlockTimes(
            forward,
            forward,
            gradients,
            4 * shape.embedding * ANSWERS * tokens / HEAD,
            tokens * shape.hidden * 2 / self.bus,
        )

    def seconds(
        self,
        slots: int = 2,
        resident: tuple[int, ...] = (),
        inputs: str = DEVICE,
        kept: int = 0,
        fixed: float = 0.0,
    ) -> float:
        base = StreamedBase(self.shape.layers, slots, 2 * self.shape.block / self.bus, frozenset(resident))
        return step_time(self.times, base, self.micro_batches, inputs=inputs, kept=kept, fixed=fixed).seconds

    def share(self, **how) -> float:
        """Return the share of a step that is pure arithmetic; above 1 if kept activations save some of it."""
        pure = replace(self, launch_s=(0.0, 0.0))
        return pure.seconds(resident=tuple(range(self.shape.layers))) / self.seconds(**how)


def paper_budget(work: Work) -> list[float]:
    """Return the predicted shares without any improvement, and with one more of them each time."""
    quarter = tuple(spread(work.shape.layers, work.shape.layers // 4))
    return [
        work.share(inputs=BEHIND_LOADS, fixed=FIXED_NOW),
        work.share(inputs=INLINE, fixed=FIXED_NOW),
        work.share(fixed=FIXED_NOW),
        work.share(resident=quarter, fixed=FIXED_NOW),
        work.share(resident=quarter, fixed=FIXED),
    ]


def task_of(work: Work) -> Task:
    return Task(work.shape, 1, work.micro_batch, work.micro_batches, 1, answer_share=ANSWERS)


def card_with(gib: float) -> RankProfile:
    """Return the profile of a rank that may use this much memory of an H100, in a host with 128 GiB."""
    device = replace(published_device(CARDS["h100"]), memory=int(gib * GIB))
    return RankProfile(
        Node("h", device, 125 * GIB, ram_rate=100e9, nvme=0, disk_rate=1.0, link_rate=1.0, local_rate=1.0),
        1,
        1,
        cluster_ranks=1,
        cluster_nodes=1,
        carried=1,
        participants=1,
        participants_here=1,
    )


@dataclass(frozen=True)
class Improved:
    """The best use of some device memory with all improvements."""

    inputs: str
    slots: int
    kept: int
    share: float


def improved(work: Work, gib: float) -> Improved:
    """Search all numbers of slots, each with as many kept activations as fit into the rest of the memory by
    the planner's model of memory.
    """
    task = task_of(work)
    profile = card_with(gib)
    candidates = []
    for inputs in (DEVICE, HOST):
        for slots in range(1, work.shape.layers + 1):
            setting = Setting(
                "ram",
                1,
                work.micro_batches,
                resident_blocks=0,
                block_slots=slots,
                client_slots=1,
                block_inputs=inputs,
            )
            kept = _most_kept(task, profile, setting)
            if kept is not None:
                share = work.share(slots=slots, inputs=inputs, kept=kept, fixed=FIXED)
                candidates.append(Improved(inputs, slots, kept, share))
    return max(candidates, key=lambda one: (round(one.share, 4), one.inputs == DEVICE, -one.slots))


def _most_kept(task: Task, profile: RankProfile, setting: Setting) -> int | None:
    """Return for how many pairs of a block and a micro-batch activations can be kept; None: the setting does
    not fit even without any.
    """

    def fits(kept: int) -> bool:
        chosen = replace(setting, activation_bytes=kept * kept_bytes(task, setting))
        return memory_of(task, chosen, profile).gpu_bytes <= profile.node.device.memory

    if not fits(0):
        return None
    low = 0
    high = setting.accumulation * (task.shape.layers - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def shares_text(shares: list[float]) -> list[str]:
    """Return shares as the cells of a row."""
    return [f"{share:.3f}" for share in shares]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["--:"] * (len(head) - 1)], *rows])


def print_improvements(works: dict[str, Work]) -> None:
    """Print the shares of paper_budget for each model and step."""
    print(
        f"Shares of pure arithmetic: {BUS / 1e9:.0f} GB/s, {MATRICES / 1e12:.0f} TFLOP/s, "
        f"{MICRO_BATCH} tokens a micro-batch, 2 slots\n"
    )
    head = [
        "",
        "inputs behind loads",
        "inputs between loads",
        "inputs hidden",
        "+ a quarter resident, spread",
        "+ fixed cost 10 ms",
    ]
    print(table(head, [[name, *shares_text(paper_budget(work))] for name, work in works.items()]))


def print_implemented(works: dict[str, Work]) -> None:
    """Print the shares as the improvements that were implemented are added one by one."""
    print(
        "\nEach improvement added to those before it, starting from: 2 slots, inputs on the compute stream "
        "behind the loads, 50 ms fixed\n"
    )
    rows = []
    for name, work in works.items():
        slots = 2 + work.shape.layers // 4
        shares = [
            work.share(inputs=BEHIND_LOADS, fixed=FIXED_NOW),
            work.share(inputs=HOST, fixed=FIXED_NOW),
            work.share(inputs=HOST, slots=slots, fixed=FIXED_NOW),
            work.share(inputs=HOST, slots=slots, fixed=FIXED),
        ]
        rows.append([name, *shares_text(shares)])
    head = [
        "",
        "before",
        "+ inputs on separate streams",
        "+ a quarter of the blocks as slots",
        "+ fixed cost 10 ms",
    ]
    print(table(head, rows))


def print_best_settings(works: dict[str, Work]) -> None:
    """Print the best settings with all improvements in 11 and in 24 GiB of device memory."""
    print(
        "\nAll improvements, in this much device memory by the model of memory (slots; kept: pairs of a "
        "block and a micro-batch whose activations are kept, not recomputed, which brings the share above 1; "
        "where block inputs are stored)\n"
    )
    rows = []
    for name, work in works.items():
        best = [improved(work, gib) for gib in (11, 24)]
        cells = [
            f"{one.share:.3f} ({one.slots} slots, {one.kept} kept, inputs on {one.inputs})" for one in best
        ]
        rows.append([name, *cells])
    print(table(["", "11 GiB", "24 GiB"], rows))


def print_resident_or_slots(work: Work) -> None:
    """Print the shares of resident blocks and of slots in the same memory, on a fast and a slow bus."""
    print(
        "\n7B, 8k tokens a step, 2 048 a micro-batch, 7 blocks more than two slots, inputs hidden, "
        "fixed 10 ms\n"
    )
    slow = replace(work, bus=25e9)
    settings: dict[str, dict] = {
        "the lowest 7 resident": {"resident": tuple(range(7))},
        "7 resident, spread": {"resident": tuple(spread(work.shape.layers, 7))},
        "9 slots": {"slots": 9},
    }
    rows = []
    for name, options in settings.items():
        shares = [one.share(fixed=FIXED, **options) for one in (work, slow)]
        rows.append([name, *shares_text(shares)])
    print(table(["", "55 GB/s", "25 GB/s"], rows))


def print_micro_batches(work: Work) -> None:
    """Print the shares by the size of a micro-batch, with hidden kernel launches and limited by launches."""
    print(
        "\n7B, 8k tokens a step, 9 slots, inputs on separate streams, fixed 10 ms, by the size of a "
        "micro-batch\n"
    )
    rows = []
    for tokens in (512, 1_024, 2_048, 4_096):
        small = replace(work, micro_batch=tokens)
        bound = replace(small, launch_s=MIN_BLOCK_S["gpu"])
        shares = [one.share(slots=9, inputs=HOST, fixed=FIXED) for one in (small, bound)]
        rows.append([f"{tokens} tokens", *shares_text(shares)])
    floor = " + ".join(f"{1000 * seconds:g}" for seconds in MIN_BLOCK_S["gpu"])
    print(table(["", "launches hidden", f"launches of {floor} ms"], rows))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    works = {
        f"{name}, {tokens // 1024}k tokens a step": Work(shape_of(model), tokens)
        for tokens in STEPS
        for name, model in MODELS.items()
    }
    print_improvements(works)
    print_implemented(works)
    print_best_settings(works)
    seven = Work(shape_of(MODELS["7B"]), STEPS[0], 2_048)
    print_resident_or_slots(seven)
    print_micro_batches(seven)


if __name__ == "__main__":
    main()

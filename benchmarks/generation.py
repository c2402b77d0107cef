"""Greedy generation beside transformers' `generate`: the same model, prompts and number of new tokens, in one
process.

    python benchmarks/generation.py [--base runs/smollm2-135m] [--batch 1,8,32] [--tiers resident,ram,nvme]
        [--prompt 64] [--prefix 0] [--new 32] [--repeat 3] [--dtype fp32|bf16]

Prompts are random tokens, of between half and all of `--prompt`; `--prefix` more tokens stand before each of
them and are the same for all, as the examples of a few-shot task are. transformers gets them as one batch
that is padded on the left, and keeps its default cache. No answer ends before `--new` tokens.

The systems take turns, in the opposite order every other time. A speed is new tokens a second, reading of the
prompts included; a ratio is the median of neighbouring runs, since changes of the machine's own speed affect
both of a pair. `equal` is the share of our answers that are transformers' to the last token. In fp32 all of
them should be; in bf16, where many logits are equal after rounding, sums in another order choose others.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import ds_config, join_ranks, quartiles, run_ranks  # noqa: E402

THEIRS = "transformers"


@dataclass
class Timed:
    """What was measured of one system with one batch size.

    Attributes:
        seconds: of each run. answers: the tokens of each prompt's answer, from the last run.
    """

    seconds: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)


def work(rank: int, port: int, folder: str, args, *, results) -> None:
    """Build all systems, time them, and put (rank, measurements by batch size and system) into `results`."""
    import numpy as np
    import torch

    from fedspeed.engine.world import leave_world
    from fedspeed.models.catalogue import shape_of

    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    join_ranks(port)
    rng = np.random.default_rng(0)
    vocabulary = shape_of(args.base).vocab
    prefix = rng.integers(3, vocabulary, args.prefix)
    lengths = rng.integers(-(-args.prompt // 2), args.prompt + 1, max(args.batch))
    prompts = [np.concatenate([prefix, rng.integers(3, vocabulary, length)]) for length in lengths]
    systems = build_systems(args, folder)
    measured: dict[int, dict[str, Timed]] = {}
    for batch in args.batch:
        measured[batch] = {name: Timed() for name in systems}
        for i in range(args.repeat + 1):
            for name in list(systems)[:: -1 if i % 2 else 1]:
                begin = time.perf_counter()
                answers = systems[name](prompts[:batch], args.new if i else 2)
                if i:  # the first is not timed
                    took = time.perf_counter() - begin
                    print(f"batch {batch}, {name}: {took:.2f} s", file=sys.stderr, flush=True)
                    measured[batch][name].seconds.append(took)
                    measured[batch][name].answers = answers
    results.put((rank, measured))
    leave_world()


def build_systems(args, folder: str) -> dict[str, Callable]:
    """Return by name what answers (prompts, number of new tokens)."""
    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock

    systems: dict[str, Callable] = {THEIRS: transformers_answers(args)}
    for tier in args.tiers:
        spec = EngineSpec(
            model=ModelConfig(base=args.base, dtype=args.dtype),
            adapter=AdapterConfig(),
            train=TrainConfig(),
            engine=EngineConfig(tier=tier, threads=args.threads),
            deepspeed=ds_config(0, args.dtype),
        )
        nvme = Path(folder) / tier
        engine = build_engine(spec, EngineContext(client_sets=[(0,)], clock=StageClock(), nvme=nvme, seed=0))
        engine.load(engine.state())
        systems[tier] = our_answers(engine)
    return systems


def our_answers(engine) -> Callable:
    """Return a function that lets an engine answer."""

    def answer(prompts, new):
        return [answers[0].tolist() for answers in engine.generate(prompts, max_new=new)]

    return answer


def transformers_answers(args) -> Callable:
    """Return a function that lets transformers answer, with the same LoRA adapter as the engines have (whose
    B is zero).
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from fedspeed.engine.generation.batches import right_aligned
    from fedspeed.models.adapters import lora_config
    from fedspeed.models.config import AdapterConfig
    from fedspeed.models.loading import DTYPES

    dtype = DTYPES[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype, trust_remote_code=False)
    if args.peft:
        ours = lora_config(AdapterConfig(), model)
        lora = LoraConfig(r=ours.r, lora_alpha=ours.lora_alpha, target_modules=ours.target_modules)
        model = get_peft_model(model, lora).to(dtype)
    model.eval()

    def answer(prompts, new):
        tokens, real = right_aligned(prompts)
        whole = model.generate(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(real).long(),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        return whole[:, tokens.shape[1] :].tolist()

    return answer


def report(args, measured: dict[int, dict[str, Timed]]) -> str:
    """Make a Markdown table of speeds and ratios."""
    lines = [
        "| batch | system | tokens/s | beside transformers | half of the pairs | equal answers |",
        "| ---: | --- | ---: | ---: | --- | ---: |",
    ]
    for batch, timed in measured.items():
        theirs = timed[THEIRS]
        for name, system in timed.items():
            speed = batch * args.new / statistics.median(system.seconds)
            row = f"| {batch} | {name} | {speed:.1f} |"
            if name == THEIRS:
                lines.append(f"{row} 1 | | |")
                continue
            low, middle, high = quartiles(theirs.seconds, system.seconds)
            equal = sum(one == other for one, other in zip(system.answers, theirs.answers))
            lines.append(f"{row} {middle:.2f}x | {low:.2f}-{high:.2f} | {equal} of {batch} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=str(ROOT / "runs" / "smollm2-135m"), help="a folder with weights")
    parser.add_argument("--batch", default="1,8,32", help="numbers of prompts")
    parser.add_argument("--tiers", default="resident,ram,nvme")
    for name, default in {"prompt": 64, "prefix": 0, "new": 32, "repeat": 3, "threads": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument(
        "--peft", action="store_true", help="let transformers compute the LoRA adapter too, through PEFT"
    )
    args = parser.parse_args()
    args.batch = [int(size) for size in args.batch.split(",")]
    args.tiers = args.tiers.split(",")
    return args


def main() -> None:
    args = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        results = run_ranks(work, 1, lambda rank, port: (rank, port, folder, args))
    print(report(args, results[0]))


if __name__ == "__main__":
    main()

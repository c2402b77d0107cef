"""Measure how well the content of cells reveals whose they are, from round to round, with masks and without:
`fedspeed audit` on real rows.

    python benchmarks/linkage.py [--only dolly|codealpaca|gsm8k] [--rounds N]

Dolly by category over 8 clients and CodeAlpaca by language over 9 (201 rounds each), GSM8K spread evenly over
3 (2 501 rounds), on a small Llama with random weights that trains LoRA. The coalition is all owners of
chunks, so it sees the content of every cell. Needs the data of the task (data.path).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# (split, clients, rounds) of each task.
TASKS = {"dolly": ("meta", 8, 201), "codealpaca": ("meta", 9, 201), "gsm8k": ("iid", 3, 2501)}


def main() -> None:
    """Run the audit of one task or of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--values", type=int, default=4096)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for task in [args.only] if args.only else TASKS:
            split, clients, rounds = TASKS[task]
            overrides = [
                f"data.task={task}",
                f"data.split={split}",
                f"data.clients={clients}",
                f"model.base={folder}",
                "model.init=random",
                "model.dtype=fp32",
                "model.tokenizer=bytes",
                "data.max_tokens=256",
                "data.template=plain",
                "data.max_rows=1200",
                "train.local_steps=2",
                "train.micro_batch=4",
                "train.lr=1e-2",
            ]
            print(f"== {task}", flush=True)
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "fedspeed",
                    "audit",
                    "--config",
                    str(ROOT / "ds_configs" / "quickstart.yaml"),
                    *overrides,
                    "--rounds",
                    str(args.rounds or rounds),
                    "--values",
                    str(args.values),
                ],
                cwd=ROOT,
                check=True,
            )


def write_model(folder: Path) -> None:
    """Write the config.json of the small model."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
        max_position_embeddings=256,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()

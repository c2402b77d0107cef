"""The task that every system is measured on, and its files, which are the same for all of them.

Three clients (IID) and a Llama of 4 blocks (hidden 256, vocabulary 512, 4 M parameters, fp32): LoRA r=8
alpha=16 on q and v, AdamW 1e-3 with fresh state each round, batch 4 x 128 tokens, 10 local steps, 5 rounds,
held-out loss after each. Systems that train without a federation train what one client trains: the first
third of the rows, and 5 times 10 steps with optimizer state that stays.

    python -m benchmarks.compare.outside.task prepare|three-clients|one-client FOLDER

writes the files, or runs the reference: a plain loop that trains the clients in turn. The text is GSM8K in
bytes if FEDSPEED_DATA or ../shared/data has it, else that of the built-in generator.
"""

import gzip
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 5
STEPS = 10
BATCH = 4
CLIENTS = 3
TOKENS = 128
ROWS = 600
LR = 1e-3
HELD_OUT = 16  # rows of a client, at most
FEDERATION = "three-clients"
ALONE = "one-client"
TASKS = (FEDERATION, ALONE)


def settings() -> dict[str, object]:
    """Return what the results say about the task."""
    return {
        "model": "Llama, 4 blocks, hidden 256, vocabulary 512, fp32",
        "adapter": "LoRA r=8 alpha=16 on q and v",
        "optimizer": f"AdamW {LR:g}",
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "steps": STEPS,
        "batch": BATCH,
        "tokens": TOKENS,
        "rows": ROWS,
    }


def prepare(folder: Path) -> None:
    """Write base model, starting adapter, rows and the configuration of each task."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedspeed.models.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=896,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=TOKENS,
            pad_token_id=256,
            bos_token_id=257,
            eos_token_id=258,
        )
    )
    print(f"base: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ).save_pretrained(folder / "adapter")
    text = gsm8k_text().encode("ascii", "ignore").decode()
    width = TOKENS - 2  # bos and eos
    rows = [{"instruction": "", "output": text[i : i + width]} for i in range(0, ROWS * width, width)]
    _write_task(folder, FEDERATION, rows, CLIENTS)
    _write_task(folder, ALONE, rows[: ROWS // CLIENTS], 1)


def _write_task(folder: Path, task: str, rows: list[dict[str, str]], clients: int) -> None:
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config_path(folder, task).write_text(f"""
run: {{out: {folder}/runs}}
model: {{base: {folder}/base, dtype: fp32, tokenizer: bytes}}
adapter: {{start_from: {folder}/adapter}}
data:
  {{task: file, path: {folder}/{task}.jsonl, clients: {clients}, split: iid, template: plain,
    max_tokens: {TOKENS}, val_fraction: 0.1, max_val_rows: {HELD_OUT}}}
train: {{local_steps: {STEPS}, micro_batch: {BATCH}, lr: {LR}}}
federation: {{rounds: {ROUNDS}, local_optimizer: {"reset" if task == FEDERATION else "keep"}}}
routing: {{mode: plain}}
""")


def config_path(folder: Path, task: str) -> Path:
    """Return the file with a task's configuration."""
    return folder / ("run.yaml" if task == FEDERATION else f"{task}.yaml")


def gsm8k_text() -> str:
    """Return the text that the rows are cut from."""
    for place in filter(None, (os.environ.get("FEDSPEED_DATA"), ROOT.parent / "shared" / "data")):
        path = Path(place) / "gsm8k_train.jsonl.gz"
        if path.is_file():
            with gzip.open(path, "rt") as file:
                return " ".join(f"{r['question']} {r['answer']}" for r in map(json.loads, file))
    from fedspeed.data.builtin import builtin_rows

    return " ".join(f"{r.instruction} {r.output}" for r in builtin_rows(0, 9000))


def print_round(number: int, loss: float, tokens: int) -> None:
    """Print the line of round `number` (from 0) by which it is recognised.

    Args:
        loss: sum over the answer tokens of the held-out rows. tokens: their number.
    """
    print(json.dumps({"event": "round", "round": number + 1, "val_loss": loss / tokens}), flush=True)


def plain_loop(folder: Path, task: str) -> None:
    """Run the reference: a plain loop that trains the clients of a task in turn."""
    import torch

    from benchmarks.compare.outside.trainer import Trainer

    trainer = Trainer(folder, task)
    state = trainer.state()
    clients = range(len(trainer.rows))
    weights = [trainer.weight(c) for c in clients]
    for number in range(ROUNDS):
        total = [torch.zeros_like(v) for v in state]
        for client in clients:
            trainer.load_state(state)
            trainer.train(client, number)
            for t, p in zip(total, trainer.trained):
                t += weights[client] / sum(weights) * p.detach()
        state = total
        trainer.load_state(state)
        print_round(number, *trainer.held_out(clients))


def main(what: str, folder: Path) -> None:
    """Prepare the files, or run the plain loop on a task."""
    if what == "prepare":
        prepare(folder)
    else:
        plain_loop(folder, what)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""What FedSpeed costs over a plain PyTorch FedAvg loop, on the task its peers were measured on.

    python benchmarks/overhead.py [--repeat 3]

3 clients (IID), a Llama of 4 blocks (hidden 256, vocabulary 512, 4 M parameters, fp32), LoRA r=8 alpha=16 on q and v, AdamW 1e-3 with fresh
state each round, batch 4 x 128 tokens, 10 local steps, 5 rounds, held-out loss after each. Every system runs as a command of its own; each
repetition runs all systems in turn. Reported: seconds from the command to the first aggregate, seconds a round (rounds 2 to 5), and the peak of
the sum over all its processes of resident memory (RSS, as the peers were measured; PSS beside it, which counts shared pages once).

The text is GSM8K in bytes where FEDSPEED_DATA or ../shared/data has it, else the built-in generator's.
"""

import argparse
import gzip
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
ROUNDS, STEPS, BATCH, CLIENTS, TOKENS, LR = 5, 10, 4, 3, 128, 1e-3

# name -> what is laid over the common configuration
SYSTEMS = {
    "FedSpeed, ZeRO-0": {"cluster.local_ranks": 3, "engine.threads": 1, "deepspeed.base": "zero0.json"},
    "FedSpeed, ZeRO-0, one rank": {"cluster.local_ranks": 1, "engine.threads": 2, "deepspeed.base": "zero0.json"},
    "FedSpeed, ZeRO-3": {"cluster.local_ranks": 3, "engine.threads": 1, "deepspeed.base": "zero3.json"},
}


def prepare(folder: Path) -> None:
    """Base model, starting adapter, rows and configuration, the same for all systems."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedspeed.models.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=896, num_hidden_layers=4, num_attention_heads=4,
                                         num_key_value_heads=4, max_position_embeddings=TOKENS, pad_token_id=256, bos_token_id=257,
                                         eos_token_id=258))
    print(f"base: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).save_pretrained(folder / "adapter")
    text = gsm8k_text().encode("ascii", "ignore").decode()
    width = TOKENS - 2  # bos and eos
    rows = [{"instruction": "", "output": text[i:i + width]} for i in range(0, 600 * width, width)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "run.yaml").write_text(f"""
run: {{out: {folder}/runs}}
model: {{base: {folder}/base, dtype: fp32, tokenizer: bytes}}
adapter: {{start_from: {folder}/adapter}}
data: {{task: file, path: {folder}/rows.jsonl, clients: {CLIENTS}, split: iid, template: plain, max_tokens: {TOKENS}, val_fraction: 0.1, max_val_rows: 16}}
train: {{local_steps: {STEPS}, micro_batch: {BATCH}, lr: {LR}}}
federation: {{rounds: {ROUNDS}}}
""")


def gsm8k_text() -> str:
    for place in filter(None, (os.environ.get("FEDSPEED_DATA"), ROOT.parent / "shared" / "data")):
        path = Path(place) / "gsm8k_train.jsonl.gz"
        if path.is_file():
            with gzip.open(path, "rt") as file:
                return " ".join(f"{r['question']} {r['answer']}" for r in map(json.loads, file))
    from fedspeed.data.builtin import builtin_rows

    return " ".join(f"{r.instruction} {r.output}" for r in builtin_rows(0, 9000))


def plain_loop(folder: Path) -> None:
    """The reference: what one writes by hand with PyTorch and PEFT, clients in turn."""
    import torch
    from peft import PeftModel
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from fedspeed.config.load import load
    from fedspeed.data.batches import client_step, eval_batches
    from fedspeed.data.clients import client_rows, encode_client
    from fedspeed.models.tokenizer import byte_tokenizer

    config = load(folder / "run.yaml", []).config
    data = [encode_client(r, byte_tokenizer(), config.data) for r in client_rows(config.data, 0)]
    weights = [sum(e.answer_tokens for e in d.train) for d in data]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [p.detach().clone() for p in trained]

    def loss_of(batch):
        ids, labels, mask = (torch.from_numpy(a) for a in (batch.input_ids, batch.labels, batch.attention_mask))
        logits = model(input_ids=ids, attention_mask=mask).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")

    def load_state(values):
        with torch.no_grad():
            for p, v in zip(trained, values):
                p.copy_(v)

    for number in range(ROUNDS):
        total = [torch.zeros_like(v) for v in state]
        model.train()
        for client, own in enumerate(data):
            load_state(state)
            optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
            for step in range(STEPS):
                batches = client_step(own, 0, client, number * STEPS + step, BATCH, 1, 1, 0)
                optimizer.zero_grad()
                (loss_of(batches.micro[0]) / batches.step_answer_tokens).backward()
                optimizer.step()
            for t, p in zip(total, trained):
                t += weights[client] / sum(weights) * p.detach()
        state = total
        load_state(state)
        model.eval()
        with torch.no_grad():
            batches = [b for d in data for b in eval_batches(d.val, BATCH, d.pad_id)]
            loss = sum(loss_of(b).item() for b in batches) / sum(b.answer_tokens for b in batches)
        print(json.dumps({"event": "round", "round": number + 1, "val_loss": loss}), flush=True)


def memory_mb(group: int) -> tuple[float, float]:
    """(RSS, PSS) in MB summed over the processes of a session."""
    rss = pss = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) != group:
                continue
            for line in (stat.parent / "smaps_rollup").read_text().splitlines():
                if line.startswith("Rss:"):
                    rss += int(line.split()[1])
                elif line.startswith("Pss:"):
                    pss += int(line.split()[1])
        except (OSError, IndexError, ValueError):  # it ended while we looked
            continue
    return rss / 1024, pss / 1024


def measure(command: list[str], env: dict[str, str]) -> dict:
    """Run a command that prints one JSON line a round; its times, losses and memory."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env, cwd=ROOT, start_new_session=True)
        os.set_blocking(process.stdout.fileno(), False)
        times, losses, peak, buffer = {}, {}, (0.0, 0.0), b""
        while True:
            ended = process.poll() is not None
            buffer += process.stdout.read() or b""
            *lines, buffer = buffer.split(b"\n")
            for event in map(json.loads, lines):
                if event["event"] == "round":
                    times[event["round"]], losses[event["round"]] = time.perf_counter() - start, event["val_loss"]
            if ended:
                break
            peak = tuple(max(a, b) for a, b in zip(peak, memory_mb(process.pid)))
            time.sleep(0.05)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors.read()[-3000:]}")
    return {"first_aggregate_s": times[1], "round_s": (times[ROUNDS] - times[1]) / (ROUNDS - 1), "total_s": time.perf_counter() - start,
            "rss_mb": peak[0], "pss_mb": peak[1], "losses": [losses[r] for r in range(1, ROUNDS + 1)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        return plain_loop(arguments.plain)
    if arguments.prepare:
        return prepare(arguments.prepare)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    env.pop("OMP_NUM_THREADS", None)
    runs: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, __file__, "--prepare", str(folder)], check=True, env=env)
        for repetition in range(arguments.repeat):
            runs.setdefault("plain PyTorch loop", []).append(measure([sys.executable, __file__, "--plain", str(folder)], env))
            for name, values in SYSTEMS.items():
                overrides = [f"{k}={v}" for k, v in values.items()] + [f"run.name={abs(hash(name))}-{repetition}"]
                runs.setdefault(name, []).append(measure(
                    [sys.executable, "launch.py", "--config", str(folder / "run.yaml"), "--json", *overrides], env))
    report(runs)


def report(runs: dict[str, list[dict]]) -> None:
    plain = runs["plain PyTorch loop"]
    keys = ("first_aggregate_s", "round_s", "total_s", "rss_mb", "pss_mb")
    print(f"\nmedians of {len(plain)}; ratio to the plain loop of the same repetition in brackets")
    print(f"{'system':28} {'first aggregate s':>18} {'s a round':>15} {'command s':>15} {'RSS MB':>15} {'PSS MB':>15}  {'loss, round ' + str(ROUNDS)}")
    for name, own in runs.items():
        cells = [f"{statistics.median(r[k] for r in own):8.2f} ({statistics.median(a[k] / b[k] for a, b in zip(own, plain)):4.2f})" for k in keys]
        print(f"{name:28} {cells[0]:>18} " + " ".join(f"{c:>15}" for c in cells[1:]) + f"  {own[0]['losses'][-1]:.6f}")
    worst = max(abs(a - b) for own in runs.values() for r in own for a, b in zip(r["losses"], plain[0]["losses"]))
    print(f"largest difference of a held-out loss from the plain loop's: {worst:.1e}")
    if worst > 1e-4:
        raise SystemExit("the losses differ: the systems did not do the same work")


if __name__ == "__main__":
    main()

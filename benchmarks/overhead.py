"""The overhead of FedSpeed over a plain PyTorch FedAvg loop, on the task that its peers were measured on.

    python benchmarks/overhead.py [--repeat 3]

3 clients (IID), a Llama of 4 blocks (hidden 256, vocabulary 512, 4 M parameters, fp32), LoRA r=8 alpha=16 on
q and v, AdamW 1e-3 with fresh state each round, batch 4 x 128 tokens, 10 local steps, 5 rounds, held-out loss
after each. Every system runs as a command of its own; each repetition runs all systems in turn. The results
are seconds from the command to the first aggregate, seconds a round (rounds 2 to 5), and the peak of resident
memory summed over all processes (RSS, as the peers were measured, and PSS, which counts shared pages once).

The text is GSM8K in bytes if FEDSPEED_DATA or ../shared/data has it, else that of the built-in generator.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.compare.processes import watch  # noqa: E402

ROUNDS = 5
STEPS = 10
BATCH = 4
CLIENTS = 3
TOKENS = 128
LR = 1e-3

PLAIN = "plain PyTorch loop"
# name -> what is laid over the common configuration
SYSTEMS = {
    "FedSpeed, ZeRO-0": {"cluster.local_ranks": 3, "engine.threads": 1, "deepspeed.base": "zero0.json"},
    "FedSpeed, ZeRO-0, one rank": {
        "cluster.local_ranks": 1,
        "engine.threads": 2,
        "deepspeed.base": "zero0.json",
    },
    "FedSpeed, ZeRO-3": {"cluster.local_ranks": 3, "engine.threads": 1, "deepspeed.base": "zero3.json"},
}


def prepare(folder: Path) -> None:
    """Write base model, starting adapter, rows and configuration, the same for all systems."""
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
    print(f"base: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ).save_pretrained(folder / "adapter")
    text = gsm8k_text().encode("ascii", "ignore").decode()
    width = TOKENS - 2  # bos and eos
    rows = [{"instruction": "", "output": text[i : i + width]} for i in range(0, 600 * width, width)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "run.yaml").write_text(f"""
run: {{out: {folder}/runs}}
model: {{base: {folder}/base, dtype: fp32, tokenizer: bytes}}
adapter: {{start_from: {folder}/adapter}}
data:
  {{task: file, path: {folder}/rows.jsonl, clients: {CLIENTS}, split: iid, template: plain,
    max_tokens: {TOKENS}, val_fraction: 0.1, max_val_rows: 16}}
train: {{local_steps: {STEPS}, micro_batch: {BATCH}, lr: {LR}}}
federation: {{rounds: {ROUNDS}}}
routing: {{mode: plain}}
""")


def gsm8k_text() -> str:
    for place in filter(None, (os.environ.get("FEDSPEED_DATA"), ROOT.parent / "shared" / "data")):
        path = Path(place) / "gsm8k_train.jsonl.gz"
        if path.is_file():
            with gzip.open(path, "rt") as file:
                return " ".join(f"{r['question']} {r['answer']}" for r in map(json.loads, file))
    from fedspeed.data.builtin import builtin_rows

    return " ".join(f"{r.instruction} {r.output}" for r in builtin_rows(0, 9000))


class Trainer:
    """Training and evaluation by hand with PyTorch and PEFT, one model for all clients of a process: the
    plain loop's, and that of the peers' clients.

    A state is the list of the adapter's tensors, in the order of `names`. Rows are encoded when their client
    is first asked for.
    """

    def __init__(self, folder: Path):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from fedspeed.config.load import load
        from fedspeed.data.clients import client_rows
        from fedspeed.models.tokenizer import byte_tokenizer

        self.config = load(folder / "run.yaml", []).config.data
        self.rows = client_rows(self.config, 0)
        self.tokenizer = byte_tokenizer()
        self.encoded = {}
        self.model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "base", trust_remote_code=False),
            folder / "adapter",
            is_trainable=True,
        )
        named = {n.replace(".default.", "."): p for n, p in self.model.named_parameters() if p.requires_grad}
        self.names = list(named)  # as in the adapter's file
        self.trained = list(named.values())

    def data(self, client: int):
        from fedspeed.data.clients import encode_client

        if client not in self.encoded:
            self.encoded[client] = encode_client(self.rows[client], self.tokenizer, self.config)
        return self.encoded[client]

    def weight(self, client: int) -> int:
        """Of its update in the aggregate: the answer tokens of its training rows."""
        return sum(e.answer_tokens for e in self.data(client).train)

    def state(self) -> list:
        return [p.detach().clone() for p in self.trained]

    def load_state(self, values) -> None:
        import torch

        with torch.no_grad():
            for p, v in zip(self.trained, values):
                p.copy_(v)

    def train(self, client: int, number: int) -> None:
        """Take the local steps of round `number` (from 0), from the loaded state."""
        import torch

        from fedspeed.data.batches import client_step

        self.model.train()
        optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        for step in range(STEPS):
            batches = client_step(
                self.data(client),
                0,
                client,
                step=number * STEPS + step,
                micro_batch=BATCH,
                accumulation=1,
                ranks=1,
                client_rank=0,
            )
            optimizer.zero_grad()
            (self._loss(batches.micro[0]) / batches.step_answer_tokens).backward()
            optimizer.step()

    def held_out(self, clients) -> tuple[float, int]:
        """(sum of the loss, answer tokens) over the held-out rows of these clients."""
        import torch

        from fedspeed.data.batches import eval_batches

        self.model.eval()
        with torch.no_grad():
            batches = [b for c in clients for b in eval_batches(self.data(c).val, BATCH, self.data(c).pad_id)]
            return sum(self._loss(b).item() for b in batches), sum(b.answer_tokens for b in batches)

    def _loss(self, batch):
        import torch
        from torch.nn.functional import cross_entropy

        ids, labels, mask = (
            torch.from_numpy(a) for a in (batch.input_ids, batch.labels, batch.attention_mask)
        )
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )


def print_round(number: int, loss: float, tokens: int) -> None:
    """Print the line of round `number` (from 0) that `measure` waits for."""
    print(json.dumps({"event": "round", "round": number + 1, "val_loss": loss / tokens}), flush=True)


def plain_loop(folder: Path) -> None:
    """Run the reference: a plain loop that trains the clients in turn."""
    import torch

    trainer = Trainer(folder)
    state = trainer.state()
    weights = [trainer.weight(c) for c in range(CLIENTS)]
    for number in range(ROUNDS):
        total = [torch.zeros_like(v) for v in state]
        for client in range(CLIENTS):
            trainer.load_state(state)
            trainer.train(client, number)
            for t, p in zip(total, trainer.trained):
                t += weights[client] / sum(weights) * p.detach()
        state = total
        trainer.load_state(state)
        print_round(number, *trainer.held_out(range(CLIENTS)))


def measure(command: list[str], env: dict[str, str]) -> dict:
    """Run a command that prints one JSON line a round; its times, losses and memory."""
    watched = watch(command, cwd=ROOT, env=env)
    times = {}
    losses = {}
    for seconds, line in watched.lines:  # a peer also logs
        if line.startswith("{") and (event := json.loads(line))["event"] == "round":
            times[event["round"]] = seconds
            losses[event["round"]] = event["val_loss"]
    if watched.code or len(times) < ROUNDS:
        raise SystemExit(f"{' '.join(command)} ended with {watched.code}:\n{watched.errors}")
    return {
        "first_aggregate_s": times[1],
        "round_s": (times[ROUNDS] - times[1]) / (ROUNDS - 1),
        "total_s": watched.seconds,
        "rss_mb": watched.rss / 2**20,
        "pss_mb": watched.pss / 2**20,
        "losses": [losses[r] for r in range(1, ROUNDS + 1)],
    }


def commands(folder: Path, repetition: int) -> dict[str, list[str]]:
    """Name to command of the plain loop and of FedSpeed."""
    found = {PLAIN: [sys.executable, str(Path(__file__)), "--plain", str(folder)]}
    for name, values in SYSTEMS.items():
        overrides = [f"{k}={v}" for k, v in values.items()] + [f"run.name={abs(hash(name))}-{repetition}"]
        found[name] = [
            sys.executable,
            "launch.py",
            "--config",
            str(folder / "run.yaml"),
            "--json",
            *overrides,
        ]
    return found


def compare(systems: Callable[[Path, int], dict[str, list[str]]], repeat: int) -> None:
    """Prepare the task, run what `systems` names for (its folder, the repetition), and report. The plain loop
    has to be among it.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    env.pop("OMP_NUM_THREADS", None)
    runs: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, __file__, "--prepare", str(folder)], check=True, env=env)
        for repetition in range(repeat):
            for name, command in systems(folder, repetition).items():
                runs.setdefault(name, []).append(measure(command, env))
    report(runs)


def report(runs: dict[str, list[dict]]) -> None:
    plain = runs[PLAIN]
    keys = ("first_aggregate_s", "round_s", "total_s", "rss_mb", "pss_mb")
    print(f"\nmedians of {len(plain)}; ratio to the plain loop of the same repetition in brackets")
    print(
        f"{'system':28} {'first aggregate s':>18} {'s a round':>15} {'command s':>15} {'RSS MB':>15} "
        f"{'PSS MB':>15}  {'loss, round ' + str(ROUNDS)}"
    )
    for name, own in runs.items():
        cells = [
            f"{statistics.median(r[k] for r in own):8.2f} "
            f"({statistics.median(a[k] / b[k] for a, b in zip(own, plain)):4.2f})"
            for k in keys
        ]
        print(
            f"{name:28} {cells[0]:>18} "
            + " ".join(f"{c:>15}" for c in cells[1:])
            + f"  {own[0]['losses'][-1]:.6f}"
        )
    worst = max(
        abs(a - b) for own in runs.values() for r in own for a, b in zip(r["losses"], plain[0]["losses"])
    )
    print(f"largest difference of a held-out loss from the plain loop's: {worst:.1e}")
    if worst > 1e-4:
        raise SystemExit("the losses differ: the systems did not do the same work")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        plain_loop(arguments.plain)
    elif arguments.prepare:
        prepare(arguments.prepare)
    else:
        compare(commands, arguments.repeat)


if __name__ == "__main__":
    main()

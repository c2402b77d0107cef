"""Held-out losses of adapters, by client and category, with transformers and PEFT alone.

An evaluation that does not use the engine that trained: it reads what a run exported.
"""

import json
import time
from pathlib import Path

from fedspeed.data.clients import client_rows
from fedspeed.data.prompt_template import template_for
from fedspeed.files import write_atomically
from fedspeed.models.tokenizer import load_tokenizer

FOLDER = "held-out"


def evaluate(folder: Path, name: str, config) -> None:
    """Evaluate a run's adapter, or the base, on the held-out rows of all clients, and write FOLDER/NAME.json:
    a list of {client, category, loss, tokens, rows}, where `loss` is summed over `tokens`.

    Args:
        folder: of the task's runs. name: of the run, or "base". config: of the task's YAML (RunConfig).
    """
    path = folder / FOLDER / f"{name}.json"
    if path.exists():
        return
    start = time.monotonic()
    model = _model(config.model.base, None if name == "base" else folder / name / "adapter")
    tokenizer = load_tokenizer(config.model)
    template = template_for(config.data, tokenizer)
    sums: dict[tuple[int, str], list[float]] = {}
    for client in client_rows(config.data, config.run.seed):
        for row in client.val:
            total = sums.setdefault((client.client, row.category), [0.0, 0, 0])
            for example in template.encode(row).examples:
                loss, tokens = _loss(model, example)
                total[0] += loss
                total[1] += tokens
            total[2] += 1
    table = [
        {"client": client, "category": category, "loss": loss, "tokens": tokens, "rows": rows}
        for (client, category), (loss, tokens, rows) in sorted(sums.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(table, indent=1).encode() + b"\n")
    mean = sum(entry["loss"] for entry in table) / sum(entry["tokens"] for entry in table)
    print(f"{name}: held-out loss {mean:.4f} ({time.monotonic() - start:.0f} s)", flush=True)


def _model(base: str, adapter: Path | None):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def _loss(model, example) -> tuple[float, int]:
    """Return the sum of the loss over an example's answer tokens, and their number."""
    import torch
    from torch.nn.functional import cross_entropy

    ids = torch.from_numpy(example.input_ids)[None].long()
    labels = torch.from_numpy(example.labels)[1:]
    trained = labels != -100
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :-1][trained].float()
    return cross_entropy(logits, labels[trained], reduction="sum").item(), int(trained.sum())

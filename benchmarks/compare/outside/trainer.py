"""Training and evaluation by hand with PyTorch and PEFT: the plain loop's, and that of the peers' clients."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from benchmarks.compare.outside.task import BATCH, FEDERATION, LR, STEPS, config_path


class Trainer:
    """One model for all clients of a process.

    A state is the list of the adapter's tensors, in the order of `names`. Rows are encoded when their client
    is first asked for.
    """

    def __init__(self, folder: Path, task: str = FEDERATION):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from fedspeed.config.load import load
        from fedspeed.data.clients import client_rows
        from fedspeed.models.tokenizer import byte_tokenizer

        config = load(config_path(folder, task), []).config
        self.config = config.data
        self.keeps_optimizer = config.federation.local_optimizer == "keep"
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

    @cached_property
    def optimizer(self):
        """Return the optimizer of a client whose state is kept from round to round."""
        return self.new_optimizer()

    def new_optimizer(self):
        """Return an optimizer of the adapter without state."""
        import torch

        return torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)

    def data(self, client: int):
        """Return the encoded rows of a client."""
        from fedspeed.data.clients import encode_client

        if client not in self.encoded:
            self.encoded[client] = encode_client(self.rows[client], self.tokenizer, self.config)
        return self.encoded[client]

    def weight(self, client: int) -> int:
        """Return the weight of its update in the aggregate: the answer tokens of its training rows."""
        return sum(e.answer_tokens for e in self.data(client).train)

    def state(self) -> list:
        """Return a copy of the adapter's tensors."""
        return [p.detach().clone() for p in self.trained]

    def load_state(self, values) -> None:
        """Overwrite the adapter's tensors."""
        import torch

        with torch.no_grad():
            for p, v in zip(self.trained, values):
                p.copy_(v)

    def step_batches(self, client: int, step: int, *, ranks: int = 1, rank: int = 0):
        """Return the rows of one of `ranks` ranks in a step, counted from 0 over all rounds."""
        from fedspeed.data.batches import client_step

        return client_step(
            self.data(client),
            0,
            client,
            step=step,
            micro_batch=BATCH // ranks,
            accumulation=1,
            ranks=ranks,
            client_rank=rank,
        )

    def train(self, client: int, number: int) -> None:
        """Take the local steps of round `number` (from 0), from the loaded state."""
        self.model.train()
        optimizer = self.optimizer if self.keeps_optimizer else self.new_optimizer()
        for step in range(STEPS):
            batches = self.step_batches(client, number * STEPS + step)
            optimizer.zero_grad()
            (self.loss(batches.micro[0]) / batches.step_answer_tokens).backward()
            optimizer.step()

    def held_out(self, clients: Iterable[int]) -> tuple[float, int]:
        """Return (sum of the loss, answer tokens) over the held-out rows of these clients."""
        import torch

        from fedspeed.data.batches import eval_batches

        self.model.eval()
        with torch.no_grad():
            batches = [b for c in clients for b in eval_batches(self.data(c).val, BATCH, self.data(c).pad_id)]
            return sum(self.loss(b).item() for b in batches), sum(b.answer_tokens for b in batches)

    def loss(self, batch, model=None):
        """Return the sum of the loss over the answer tokens of a batch, as a tensor.

        Args:
            model: the same model as another library has wrapped it.
        """
        import torch
        from torch.nn.functional import cross_entropy

        ids, labels, mask = (
            torch.from_numpy(a) for a in (batch.input_ids, batch.labels, batch.attention_mask)
        )
        logits = (model or self.model)(input_ids=ids, attention_mask=mask).logits
        return cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

"""What a model computes of single micro-batches: their embedding, one block at a time, head and loss. In
which order, others decide.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import nn
from transformers import masking_utils

from fedspeed.data.batches import Batch
from fedspeed.data.encode import IGNORED
from fedspeed.engine.compute.compiled import CompiledBlocks
from fedspeed.engine.compute.uploads import upload, upload_rows
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.limits import LOGITS_BYTES

Tensors = dict[str, torch.Tensor]


@dataclass
class MicroBatchTask:
    """One micro-batch of one owner.

    Attributes:
        owner: whose trainable tensors it is computed with.
        scale: factor of its summed loss in what is differentiated.
        seed: of its dropout.
    """

    batch: Batch
    owner: int
    scale: float = 1.0
    seed: int = 0


def seed_of(turn: int, step: int, number: int) -> int:
    """The seed of a micro-batch's dropout, by that of its client's turn, its step in the turn and its number
    in the step.
    """
    return turn * 1_000_003 + step * 1_009 + number


@dataclass
class Score:
    """Sums over one micro-batch: cross-entropy of its answer tokens, rows whose answer greedy decoding would
    give, rows with an answer.

    `loss` and `right` (by answer token, whether greedy decoding would give it; None where nobody asked) lie
    on the device until `told` reads those of a whole pass at once: asking the device for a number waits for
    all it has to do.
    """

    loss: float | torch.Tensor
    right: torch.Tensor | None = None
    exact: int = 0
    rows: int = 0


class MicroBatchModel:
    """Args:
    model: as built, its trainable parameters inside the blocks.
    compiled: whether blocks are computed by code that torch compiles.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, compiled: bool = False):
        self._parts = parts
        self.device = torch.device(get_accelerator().current_device_name())
        self._logits_bytes = LOGITS_BYTES["cpu" if get_accelerator().is_synchronized_device() else "gpu"]
        # Some families give attention's dropout to a function, with no module that would show it.
        stated = any(
            value for key, value in model.config.to_dict().items() if key.endswith(("dropout", "_pdrop"))
        )
        self._dropout = stated or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self._compiled = CompiledBlocks(parts.blocks, model.config) if compiled else None

    @torch.no_grad()
    def enter(self, task: MicroBatchTask, table: torch.Tensor | None) -> tuple[torch.Tensor, "list[Call]"]:
        """Embed a micro-batch: (what enters the first block, [B, T, hidden], what each block is called with
        beside its input). What the model computes once for all blocks (positions, the masks of sliding
        windows) is recorded, not rebuilt.

        Args:
            table: see `embedded`.
        """
        embedded = self.embedded(task.batch.input_ids, table)
        with self.recorded() as (entered, calls), self._seeded(task, -1), not_packed():
            self._parts.decoder(inputs_embeds=embedded, attention_mask=needed_mask(task.batch))
        return entered[0], calls

    def embedded(self, ids: np.ndarray, table: torch.Tensor | None) -> torch.Tensor:
        """Look up tokens [B, T].

        Args:
            table: the embedding's weights, wherever they lie; None: what enters the first block comes from
                elsewhere, and only the shape of the result is true.
        """
        if table is None:
            shape = (*ids.shape, self._parts.embedding.embedding_dim)
            return torch.zeros(shape, dtype=self._parts.norm.weight.dtype, device=self.device)
        if table.device.type == "cpu":
            return upload_rows(table, torch.from_numpy(ids))
        return nn.functional.embedding(upload(torch.from_numpy(ids)), table)

    def block(
        self, b: int, task: MicroBatchTask, calls: "Sequence[Call]", hidden: torch.Tensor
    ) -> torch.Tensor:
        """One block's output.

        Args:
            calls: what `enter` recorded.
        """
        call = calls[b]
        with self._seeded(task, b):
            if self._compiled is not None:
                out = self._compiled(b, (hidden, *call.args), call.kwargs)
            else:
                out = self._parts.blocks[b](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def recorded(self):
        """The decoder's blocks only note what they were called with: ([what enters the first block], what
        each gets beside it).
        """
        entered: list[torch.Tensor] = []
        calls: list[Call] = []
        recorders = nn.ModuleList(_Recorder(entered, calls) for _ in self._parts.blocks)
        setattr(self._parts.decoder, self._parts.blocks_name, recorders)
        try:
            yield entered, calls
        finally:
            setattr(self._parts.decoder, self._parts.blocks_name, self._parts.blocks)

    @contextmanager
    def _seeded(self, task: MicroBatchTask, b: int):
        """The same dropout masks whenever this block computes this task, in whatever order tasks are
        computed.
        """
        if not self._dropout:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((task.seed * 1_000_003 + b + 1) % 2**63)
            yield

    def head(
        self, hidden: torch.Tensor, task: MicroBatchTask, differentiate: bool = True
    ) -> tuple[Score, torch.Tensor | None]:
        """Norm, head and loss of the answer tokens only, some rows at a time; also the gradient of scale *
        loss by `hidden`.
        """
        labels = task.batch.labels
        at = np.nonzero(labels[:, 1:] != IGNORED)
        # One small copy: which tokens of the batch, counted through, are asked for an answer, and which.
        where, targets = upload(
            torch.from_numpy(np.stack([at[0] * labels.shape[1] + at[1], labels[:, 1:][at]]))
        )
        rows = max(1, self._logits_bytes // (self._parts.head.weight.shape[0] * hidden.element_size()))
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = []
        with torch.set_grad_enabled(differentiate):
            x = hidden.requires_grad_(differentiate)
            normed = self._parts.norm(x).flatten(0, 1).index_select(0, where)
            leaf = normed.detach()
            downward = torch.empty_like(leaf) if differentiate else None
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                piece = leaf[part].requires_grad_(differentiate)
                logits = self._parts.head(piece)
                lost = chunked_cross_entropy(logits, targets[part], reduction="sum")
                loss += lost.detach()
                if differentiate:
                    (downward[part],) = torch.autograd.grad(lost * task.scale, piece)
                else:
                    right.append(logits.argmax(-1) == targets[part])
            flow = torch.autograd.grad(normed, x, downward)[0] if differentiate else None
        return Score(loss, torch.cat(right) if right else None), flow


def needed_mask(batch: Batch) -> None:
    """The attention mask that a micro-batch needs beside the causal one: none.

    Padding stands on the right of all tokens, which look to the left only, and its own output is asked for by
    nobody. A mask would make attention hold all T x T scores instead of going through a fused kernel. A
    family whose tokens look to the right, or rows packed behind each other, would need one here.
    """
    lengths = batch.attention_mask.sum(1, keepdims=True)
    on_the_right = np.arange(batch.attention_mask.shape[1]) < lengths
    assert np.array_equal(batch.attention_mask, on_the_right), "padding is not on the right"


@dataclass
class Call:
    """What a block is called with beside its input."""

    args: tuple
    kwargs: dict


class _Recorder(nn.Module):
    """Stands where a block stands while the decoder computes what it gives to its blocks."""

    def __init__(self, entered: list[torch.Tensor], calls: list[Call]):
        super().__init__()
        self._entered = entered
        self._calls = calls

    def forward(self, hidden, *args, **kwargs):
        if not self._entered:
            self._entered.append(hidden)
        self._calls.append(Call(args, kwargs))
        return hidden


@contextmanager
def not_packed():
    """Say that rows are not packed behind each other. transformers would find out by asking the device, which
    stops the host once a micro-batch.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def told(scores: Sequence[Score], tasks: Sequence[MicroBatchTask]) -> None:
    """Make numbers of the scores of a pass, in one go."""
    if not scores:
        return
    for score, loss in zip(scores, torch.stack([score.loss for score in scores]).tolist()):
        score.loss = loss
    counted = [(score, task) for score, task in zip(scores, tasks) if score.right is not None]
    if counted:
        right = (
            torch
            .cat([score.right for score, _ in counted])
            .cpu()
            .split([len(score.right) for score, _ in counted])
        )
        for (score, task), own in zip(counted, right):
            score.exact, score.rows = _whole_rows(own, task.batch)
            score.right = None


def _whole_rows(right: torch.Tensor, batch: Batch) -> tuple[int, int]:
    """(rows of which all answer tokens are right, rows that have any). One whose answer was cut is never
    right: its end is unknown.
    """
    answers = torch.from_numpy(batch.labels)[:, 1:] != IGNORED
    wrong = torch.zeros(answers.shape, dtype=torch.bool)
    wrong[answers] = ~right
    wrong[list(batch.cut), 0] = True
    asked = answers.any(1)
    return int((asked & ~wrong.any(1)).sum()), int(asked.sum())

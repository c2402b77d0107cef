"""Compute single micro-batches: their embedding, one decoder block at a time, head and loss. Others decide in
which order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import nn
from transformers import PreTrainedModel, masking_utils

from fedspeed.data.batches import Batch
from fedspeed.data.encode import IGNORED
from fedspeed.engine.compute.compiled import CompiledBlocks
from fedspeed.engine.compute.uploads import upload, upload_rows
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.limits import logits_bytes

Tensors = dict[str, torch.Tensor]


@dataclass
class MicroBatchTask:
    """One micro-batch of one client.

    Attributes:
        batch: its rows.
        owner: number of the client whose trainable tensors it is computed with.
        scale: factor of its summed loss in what is differentiated.
        seed: of its dropout masks.
    """

    batch: Batch
    owner: int
    scale: float = 1.0
    seed: int = 0


def seed_of(turn: int, step: int, number: int) -> int:
    """Return the seed of a micro-batch's dropout masks.

    Args:
        turn: seed of its client's turn. step: its step in the turn. number: of the micro-batch in the step.
    """
    return turn * 1_000_003 + step * 1_009 + number


@dataclass
class DeviceScore:
    """Sums over one micro-batch that are still on the device: asking it for a number waits for all work that
    it has queued, so `fetch_scores` reads those of a whole pass at once.

    Attributes:
        loss: cross-entropy of all answer tokens, a scalar in float64.
        right: whether greedy decoding would give each answer token, [answer tokens] bool; None while
            training, and where there are none.
    """

    loss: torch.Tensor
    right: torch.Tensor | None


@dataclass
class Score:
    """Sums over one micro-batch.

    Attributes:
        loss: cross-entropy of all answer tokens.
        exact: rows whose whole answer greedy decoding would give. rows: rows that have an answer. Both are 0
            while training.
    """

    loss: float
    exact: int = 0
    rows: int = 0


@dataclass
class Call:
    """The arguments with which a model calls one of its blocks, after the block's input."""

    args: tuple
    kwargs: dict


class MicroBatchModel:
    """A causal LM, computed in steps: embedding, single blocks, head and loss.

    Args:
        model: as built, with its trainable parameters inside the blocks.
        parts: of the model.
        compiled: whether blocks are computed by code that torch compiles.
        logits_mib: engine.logits_mib.
    """

    def __init__(
        self, model: PreTrainedModel, parts: Anatomy, compiled: bool = False, logits_mib: int | str = "auto"
    ):
        self._parts = parts
        self._config = model.config
        self.device = torch.device(get_accelerator().current_device_name())
        kind = "cpu" if get_accelerator().is_synchronized_device() else "gpu"
        self._logits_bytes = logits_bytes(logits_mib, kind)
        # Some families give attention's dropout to a function, without a module that would show it.
        configured = any(
            value
            for key, value in model.config.to_dict().items()
            if key.endswith(("dropout", "_pdrop")) and key != "classifier_dropout"
        )
        self._dropout = configured or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self._compiled = CompiledBlocks(parts.blocks) if compiled else None

    @torch.no_grad()
    def enter(self, task: MicroBatchTask, table: torch.Tensor | None) -> tuple[torch.Tensor, list[Call]]:
        """Embed a micro-batch, and record with which arguments the model calls its blocks: positions, rotary
        embeddings and the masks of sliding windows are the model's own.

        Args:
            table: see `embedded`.

        Returns:
            (the first block's input [B, T, hidden], the call of each block).
        """
        embedded = self.embedded(task.batch.input_ids, table)
        positions = task.batch.position_ids
        boundaries = not_packed() if positions is None else packed()
        with self.recorded() as (entered, calls), self._seeded(task, -1), boundaries:
            check_padding(task.batch)
            self._parts.decoder(
                inputs_embeds=embedded,
                attention_mask=None,
                position_ids=None if positions is None else upload(torch.from_numpy(positions)),
            )
        return entered[0], calls

    def embedded(self, ids: np.ndarray, table: torch.Tensor | None) -> torch.Tensor:
        """Return what the model's embedding makes of token ids [B, T]: [B, T, hidden] on the device.

        Args:
            table: the embedding's weights [vocabulary, hidden], on the device or in host memory; None on a
                rank that does not embed: then only the shape of the result is right, and it is zero.
        """
        if table is None:
            shape = (*ids.shape, self._parts.embedding.embedding_dim)
            return torch.zeros(shape, dtype=next(self._parts.norm.parameters()).dtype, device=self.device)
        if table.device.type == "cpu":
            looked_up = upload_rows(table, torch.from_numpy(ids))
        else:
            looked_up = nn.functional.embedding(upload(torch.from_numpy(ids)), table)
        return self._parts.family.embed(looked_up, self._config)

    def block(
        self, b: int, task: MicroBatchTask, calls: Sequence[Call], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Compute block `b` for a micro-batch: [B, T, hidden] from [B, T, hidden].

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
    def recorded(self) -> Iterator[tuple[list[torch.Tensor], list[Call]]]:
        """Let the decoder's blocks only record how they are called; yields ([the first block's input], the
        call of each block), both filled by a forward of the decoder.
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
    def _seeded(self, task: MicroBatchTask, b: int) -> Iterator[None]:
        """Draw the same dropout masks whenever block `b` computes this task, in whatever order tasks are
        computed; -1 stands for what the model computes before its blocks.
        """
        if not self._dropout:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((task.seed * 1_000_003 + b + 1) % 2**63)
            yield

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Compute logits [..., vocabulary] from the final norm's output [..., hidden]. The head's weights
        must be on the device.
        """
        return self._parts.family.logits(self._parts.head(normed), self._config)

    def head(
        self, hidden: torch.Tensor, task: MicroBatchTask, differentiate: bool = True
    ) -> tuple[DeviceScore, torch.Tensor | None]:
        """Compute final norm, logits and loss of the answer tokens only, in pieces of bounded bytes.

        Args:
            hidden: the last block's output [B, T, hidden].
            differentiate: whether the gradient is asked for; else which tokens greedy decoding would give.

        Returns:
            (the sums, the gradient of scale * loss by `hidden`).
        """
        where, targets = upload(torch.from_numpy(answer_tokens(task.batch.labels)))  # one small copy
        with torch.set_grad_enabled(differentiate):
            x = hidden.requires_grad_(differentiate)
            normed = self._parts.norm(x).flatten(0, 1).index_select(0, where)
        if differentiate:
            loss, downward = self._differentiated(normed.detach(), targets, task.scale)
            return DeviceScore(loss, None), torch.autograd.grad(normed, x, downward)[0]
        return self._evaluated(normed, targets), None

    def _differentiated(
        self, normed: torch.Tensor, targets: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Differentiate the loss by the final norm's output of answer tokens.

        Args:
            normed: [n, hidden]. targets: the tokens, [n]. scale: factor of the loss.

        Returns:
            (the summed loss, the gradient of scale * loss [n, hidden]).
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        downward = torch.empty_like(normed)
        for part in self.pieces(normed):
            piece = normed[part].requires_grad_()
            with torch.enable_grad():
                lost = chunked_cross_entropy(self.logits(piece), targets[part], reduction="sum")
                (downward[part],) = torch.autograd.grad(lost * scale, piece)
            loss += lost.detach()
        return loss, downward

    @torch.no_grad()
    def _evaluated(self, normed: torch.Tensor, targets: torch.Tensor) -> DeviceScore:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = []
        for part in self.pieces(normed):
            logits = self.logits(normed[part])
            loss += chunked_cross_entropy(logits, targets[part], reduction="sum")
            right.append(logits.argmax(-1) == targets[part])
        return DeviceScore(loss, torch.cat(right) if right else None)

    def pieces(self, normed: torch.Tensor, value_bytes: int = 0) -> list[slice]:
        """Divide rows so that what is computed of the logits of each piece takes a bounded number of bytes.

        Args:
            normed: the final norm's output [n, hidden].
            value_bytes: what is computed for each logit; 0: the logit itself.
        """
        value_bytes = value_bytes or normed.element_size()
        rows = max(1, self._logits_bytes // (self._parts.head.weight.shape[0] * value_bytes))
        return [slice(start, start + rows) for start in range(0, len(normed), rows)]


def answer_tokens(labels: np.ndarray) -> np.ndarray:
    """Return the positions in the flat batch whose output predicts an answer token, and these tokens: [2, n].

    Args:
        labels: [B, T].
    """
    at = np.nonzero(labels[:, 1:] != IGNORED)
    return np.stack([at[0] * labels.shape[1] + at[1], labels[:, 1:][at]])


def check_padding(batch: Batch) -> None:
    """Assert that a micro-batch needs no attention mask except the causal one, or that of a sliding window.

    Padding follows all tokens, which attend to earlier positions only, and the output at padding is not used.
    A mask would make attention hold all T x T scores instead of going through a fused kernel. A family whose
    tokens attend to later positions would need one here. Where several rows are packed into a sequence,
    transformers makes a mask of their positions.
    """
    lengths = batch.attention_mask.sum(1, keepdims=True)
    on_the_right = np.arange(batch.attention_mask.shape[1]) < lengths
    assert np.array_equal(batch.attention_mask, on_the_right), "padding is not on the right"


class _Recorder(nn.Module):
    """Stands in for a block while the decoder computes what it gives to its blocks."""

    def __init__(self, entered: list[torch.Tensor], calls: list[Call]):
        super().__init__()
        self._entered = entered
        self._calls = calls

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if not self._entered:
            self._entered.append(hidden)
        self._calls.append(Call(args, kwargs))
        return hidden


@contextmanager
def not_packed() -> Iterator[None]:
    """Say that rows are not packed behind each other. transformers would find out by asking the device, which
    makes the host wait once a micro-batch.
    """
    with _row_numbers(lambda position_ids: None):
        yield


@contextmanager
def packed() -> Iterator[None]:
    """Say that rows are packed behind each other, each with positions from 0: a token attends to its own row
    only. As in `not_packed`, the device is not asked.
    """
    with _row_numbers(lambda position_ids: (position_ids == 0).cumsum(-1)):
        yield


@contextmanager
def _row_numbers(of: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Let transformers find by `of` which row of a sequence each token belongs to."""
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = of
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def fetch_scores(scores: Sequence[DeviceScore], tasks: Sequence[MicroBatchTask]) -> list[Score]:
    """Read the sums of a pass from the device, all in one copy of each kind."""
    if not scores:
        return []
    found = [Score(loss) for loss in torch.stack([score.loss for score in scores]).tolist()]
    counted = [
        (score, task, device.right)
        for score, task, device in zip(found, tasks, scores)
        if device.right is not None
    ]
    if counted:
        lengths = [len(right) for _, _, right in counted]
        for (score, task, _), right in zip(
            counted, torch.cat([right for _, _, right in counted]).cpu().split(lengths)
        ):
            score.exact, score.rows = _whole_rows(right, task.batch)
    return found


def _whole_rows(right: torch.Tensor, batch: Batch) -> tuple[int, int]:
    """Count (rows whose answer tokens are all right, rows that have any). A row whose answer was cut is never
    right: its end is unknown.

    Args:
        right: whether each answer token is, in the order of the batch, [answer tokens] bool.
    """
    assert batch.position_ids is None, "rows that are counted must not be packed"
    answers = torch.from_numpy(batch.labels)[:, 1:] != IGNORED
    wrong = torch.zeros(answers.shape, dtype=torch.bool)
    wrong[answers] = ~right
    wrong[list(batch.cut), 0] = True
    asked = answers.any(1)
    return int((asked & ~wrong.any(1)).sum()), int(asked.sum())

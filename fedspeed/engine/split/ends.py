"""The engine of a client in split learning: embedding, the first blocks, the last ones, final norm, head,
labels and loss. What lies between, another rank computes: hidden states go there and come back, then their
gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed import activity
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_engine import Sums
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.compute.micro_batches import DeviceScore, MicroBatchTask, fetch_scores, seed_of
from fedspeed.engine.groups import Groups
from fedspeed.engine.masters import Tensors
from fedspeed.engine.split.messages import (
    HIDDEN,
    HIDDEN_GRADIENT,
    LAST,
    LENGTHS,
    MARK,
    OUTPUT,
    OUTPUT_GRADIENT,
    Message,
    check_names,
)
from fedspeed.engine.split.part import PartEngine
from fedspeed.engine.split.rows import Rows, from_array, to_array

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ask = Callable[[Message], Message]


class EndsEngine(PartEngine):
    """Both ends of a model. It has one client slot: clients of a rank take their turns one after the other,
    since their rank has one conversation with the body. A pass is one local step, or one batch of an
    evaluation.

    Args:
        first: number of blocks before the body.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        states: list[ClientState],
        groups: Groups,
        *,
        store: BaseStore,
        clock: Clock,
        first: int,
    ):
        super().__init__(model, states, groups, store=store, clock=clock)
        self._below = range(first)
        self._above = range(first, len(self._parts.blocks))
        self._ask: Ask | None = None
        self._steps = 0  # local steps since `load`, for the seeds of dropout

    @contextmanager
    def asking(self, ask: Ask) -> Iterator[None]:
        """Compute inside with the body that `ask` reaches: it sends a message and returns the answer. All
        ranks of a client call it together, and the message of the first one counts.
        """
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def _load(
        self, slot: int, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int
    ) -> None:
        super()._load(slot, state, optimizer, frozen, seed)
        self._steps = 0

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        self._count_pass()
        (step,) = work
        self.model.train()
        self._bind(0)
        with self._clock.stage("compute"):
            scale = 1 / max(1, step.step_answer_tokens)
            seed = self._states[0].seed
            tasks = [
                MicroBatchTask(batch, 0, scale, seed_of(seed, self._steps, number))
                for number, batch in enumerate(step.micro)
            ]
            self._steps += 1
            scores = [self._differentiated(task, is_last=task is tasks[-1]) for task in tasks]
            fetched = fetch_scores(scores, tasks)
            get_accelerator().synchronize()  # so that the clock includes work that is still queued
        pairs = zip(fetched, step.micro, strict=True)
        return [sum((Sums(score.loss, batch.answer_tokens) for score, batch in pairs), Sums())]

    def _differentiated(self, task: MicroBatchTask, *, is_last: bool) -> DeviceScore:
        """Take a micro-batch through the whole model and back; add the gradients of both ends to the slot's.

        DeepSpeed averages over the client's ranks, so each multiplies its gradients by their number. The
        body's gradient is the sum over all ranks, to which the gradient that is sent belongs as it is.
        """
        rows = Rows.of(task.batch.attention_mask)
        ranks = float(self.groups.client_size)
        entered, calls = self._compute.enter(task, self._parts.embedding.weight)
        with torch.enable_grad():
            hidden = self._through(self._below, task, calls, entered)
        output = rows.unpack(self._sent(rows.pack(hidden.detach()), rows.lengths)).requires_grad_()
        with torch.enable_grad():
            top = self._through(self._above, task, calls, output)
        score, output_grad = self._compute.head(top.detach(), task)
        assert output_grad is not None, "the gradient is asked for"
        if self._above:
            output_grad = self._differentiate(0, self._above, top, output_grad, x=output, factor=ranks)
            assert output_grad is not None, "the gradient is asked for"
        hidden_grad = rows.unpack(self._sent_back(rows.pack(output_grad), is_last=is_last))
        self._differentiate(0, self._below, hidden, hidden_grad, factor=ranks)
        return score

    def _sent(self, hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return the body's output for the real tokens of this rank's rows: [n, d] from [n, d]."""
        whole, all_lengths, own = self._gathered(hidden, lengths)
        message = {HIDDEN: to_array(whole), LENGTHS: np.array(all_lengths, np.int64)}
        return from_array(self._answer(message, OUTPUT), OUTPUT, hidden, len(whole))[own]

    def _sent_back(self, grad: torch.Tensor, *, is_last: bool) -> torch.Tensor:
        """Return the gradient of the body's input, given that of its output: [n, d] from [n, d].

        Args:
            is_last: whether the local step ends with it.
        """
        whole, _, own = self._gathered(grad, ())
        message = {OUTPUT_GRADIENT: to_array(whole)} | ({LAST: MARK} if is_last else {})
        answer = self._answer(message, HIDDEN_GRADIENT)
        return from_array(answer, HIDDEN_GRADIENT, grad, len(whole))[own]

    def _answer(self, message: Message, name: str) -> Message:
        assert self._ask is not None, "the body is reached inside `asking` only"
        with self._clock.stage("idle"):
            answer = self._ask(message)
        check_names(answer, (name,))
        return answer

    def _gathered(
        self, values: torch.Tensor, lengths: Sequence[int]
    ) -> tuple[torch.Tensor, list[int], slice]:
        """Return (the values of all ranks of the client, one after the other [N, d]; the lengths of their
        rows; which of the values are this rank's). Collective over the client.
        """
        size = self.groups.client_size
        if size == 1:
            return values, list(lengths), slice(None)
        me = self.groups.client_rank
        counts = np.zeros((size, 2))
        counts[me] = len(values), len(lengths)
        tokens, rows = self.sum_over_client(counts.reshape(-1)).reshape(size, 2).astype(int).T
        all_lengths = np.zeros(rows.sum())
        all_lengths[rows[:me].sum() :][: len(lengths)] = lengths
        all_lengths = self.sum_over_client(all_lengths)
        part = values.new_zeros((tokens.max(), values.shape[1]))
        part[: len(values)] = values
        parts = part.new_empty((size * len(part), part.shape[1]))
        # As bytes: gloo does not know all types.
        dist.all_gather_into_tensor(parts.view(torch.uint8), part.view(torch.uint8), group=self.groups.client)
        whole = torch.cat([p[:n] for p, n in zip(parts.chunk(size), tokens.tolist())])
        begin = int(tokens[:me].sum())
        return whole, all_lengths.astype(int).tolist(), slice(begin, begin + len(values))

    def eval_passes(self, work: list[list[Batch]]) -> int:
        return sum(map(len, work))

    @torch.no_grad()
    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        self.model.eval()
        self._bind(0)
        return [sum((self._evaluated(batch) for batch in batches), Sums()) for batches in work]

    def _evaluated(self, batch: Batch) -> Sums:
        self._count_pass()
        task = MicroBatchTask(batch, 0)
        rows = Rows.of(batch.attention_mask)
        with self._clock.stage("compute"):
            entered, calls = self._compute.enter(task, self._parts.embedding.weight)
            hidden = self._through(self._below, task, calls, entered)
            output = rows.unpack(self._sent(rows.pack(hidden), rows.lengths))
            top = self._through(self._above, task, calls, output)
            score, _ = self._compute.head(top, task, differentiate=False)
            [found] = fetch_scores([score], [task])
        activity.advance()
        return Sums(found.loss, batch.answer_tokens, found.exact, found.rows)

    def _idle_pass(self, backward: bool) -> None:
        """Take part in a message of the client's other ranks, which have more batches to evaluate."""
        assert not backward, "all ranks of a client take equally many steps"
        norm = next(self._parts.norm.parameters())
        self._sent(norm.new_zeros((0, self._parts.embedding.embedding_dim)), ())

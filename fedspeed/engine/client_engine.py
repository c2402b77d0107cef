"""A rank's training engine, lent to one client at a time.

The engine is built once and lives as long as the run. Clients that share a rank take turns: a client's turn loads the global state
into the masters, resets (or restores) the optimizer, takes its local steps, and reads the masters back. So a rank holds one adapter
and one optimizer however many clients it carries, and nothing is reloaded between rounds.

Where ranks gather weights from each other (ZeRO-3: the base over the cluster, or at least the adapter over the client), every forward
and backward is a matched collective: all of them must make the same number of passes. `lockstep` finds that number and fills up to it
with zero-weight passes.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.groups import Groups
from fedspeed.engine.masters import open_masters

IDLE = np.zeros((1, 8), dtype=np.int64)


@dataclass(frozen=True)
class Sums:
    """Sums over answer tokens and rows, to be added before anything is divided. `steps` are those that moved the weights."""

    loss: float = 0.0
    tokens: int = 0
    exact: int = 0
    rows: int = 0
    steps: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.loss + other.loss, self.tokens + other.tokens, self.exact + other.exact, self.rows + other.rows,
                    self.steps + other.steps)

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens if self.tokens else float("nan")


class LossScaler:
    """fp16's dynamic loss scale. DeepSpeed keeps one an engine; here it starts anew with each turn, so that no client's steps depend on who
    trained before it, and a resumed run takes the same ones."""

    def __init__(self, ds_engine):
        optimizer = ds_engine.optimizer
        # ZeRO-0's optimizer in 16 bit divides by the scale, but `engine.backward` multiplies by it for ZeRO-1 to 3 only.
        self._unscaled = optimizer if hasattr(optimizer, "loss_scale_config") else None
        scaler = self._unscaled.loss_scale_config if self._unscaled else getattr(optimizer, "loss_scaler", None)
        self._state = vars(scaler) if scaler else {}
        self._first = dict(self._state)

    @property
    def missing_factor(self) -> float:
        """What a loss must still be multiplied by before `engine.backward`."""
        return float(self._unscaled.loss_scale) if self._unscaled else 1.0

    def reset(self) -> None:
        self._state.update(self._first)


class ClientEngine:
    """See the module's docstring. Built by `engine.build.build_engine`."""

    def __init__(self, ds_engine, groups: Groups, matched, clock):
        """
        Args:
            matched: group of the ranks that must make the same passes; None where every rank may go on alone.
        """
        self.ds_engine, self.groups, self._clock = ds_engine, groups, clock
        self._matched = matched if matched is not None and dist.get_world_size(matched) > 1 else None
        self._device = torch.device(get_accelerator().current_device_name())
        self._named = {n: p for n, p in sorted(ds_engine.module.named_parameters()) if p.requires_grad}
        self._masters = open_masters(ds_engine, self._named, groups)
        self._scaler = LossScaler(ds_engine)
        self._held: frozenset[str] = frozenset()
        for name, parameter in self._named.items():
            parameter.register_hook(lambda grad, name=name: torch.zeros_like(grad) if name in self._held else grad)

    @property
    def model(self) -> nn.Module:
        return self.ds_engine.module

    @property
    def names(self) -> list[str]:
        """Trainable parameters in the order every rank of every client agrees on."""
        return list(self._named)

    # A client's turn.

    def load(self, state: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor] | None = None, hold: frozenset[str] = frozenset(),
             seed: int = 0) -> None:
        """Begin a turn: global `state` into masters and copies, `optimizer` state restored or (None) reset.

        Args:
            state: full fp32 tensors by name.
            hold: names that keep their value through this turn (freeze_a, alternate). Their gradient is zeroed, so that it neither
                clips the others' nor enters momentum, and their learning rate is zero, so that decay does not move them either;
                `requires_grad=False` in mid-run would not stop ZeRO from moving them.
            seed: of dropout, the turn's own: a resumed round draws the same masks.
        """
        self._held = hold
        self.ds_engine.optimizer.zero_grad()  # an idle pass on weights that diverged leaves NaN, which a step would meet
        self._scaler.reset()
        self._masters.write(state)
        self._masters.write_optimizer(optimizer or {})
        torch.manual_seed(seed)

    def state(self) -> dict[str, torch.Tensor]:
        """Full fp32 masters on the CPU, by name."""
        return self._masters.read()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return self._masters.read_optimizer()

    def train_step(self, step: StepBatches, lr: float) -> Sums:
        """One optimizer step; returns this rank's sums. The gradient is that of the mean over the whole step's answer tokens.

        DeepSpeed averages over the client's ranks, so each rank's part of the sum is multiplied by their number. It leaves out a step whose
        gradient is not finite, which `steps` tells.
        """
        engine, total = self.ds_engine, Sums()
        self._set_lr(lr)
        engine.train()
        with self._clock.stage("compute"):
            for batch in step.micro:
                loss_sum, _ = self._loss(batch)
                mean = loss_sum * (self.groups.client_size / max(1, step.step_answer_tokens))
                engine.backward(mean * self._scaler.missing_factor, scale_wrt_gas=False)
                total += Sums(loss_sum.item(), batch.answer_tokens)
            engine.step()
            get_accelerator().synchronize()  # the clock measures what was done, not what was asked for
        return total + Sums(steps=int(engine.was_step_applied()))

    @contextmanager
    def lockstep(self, passes: int, backward: bool):
        """Surround the `passes` forward (and backward) passes this rank is about to make; ends level with the rest of the cluster.

        The number is agreed on before the first pass: afterwards the agreement itself would meet another rank's gather.
        """
        most = self._agree(passes)
        yield
        for _ in range(most - passes):
            self._idle_pass(backward)

    def _agree(self, passes: int) -> int:
        """The largest number of passes of any rank that must keep step with this one; `passes` where none does."""
        if self._matched is None:
            return passes
        word = torch.tensor([float(passes)], device=self._device)
        with self._clock.stage("idle"):
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._matched)
        return int(word.item())

    def _idle_pass(self, backward: bool) -> None:
        """A pass of zero weight that only answers the cluster's collectives; its gradient stays in the graph and is exactly zero."""
        batch = Batch(input_ids=IDLE, labels=IDLE, attention_mask=np.ones_like(IDLE), answer_tokens=0)
        with self._clock.stage("idle"):
            if backward:
                self.ds_engine.train()
                self.ds_engine.backward(self._loss(batch)[0] * 0.0, scale_wrt_gas=False)
            else:
                self.ds_engine.eval()
                with torch.no_grad():
                    self._loss(batch)
                self._end_forward_only()

    def _end_forward_only(self) -> None:
        """Drop what a pass without a backward prefetched for one. After every such pass, so that ranks in lockstep do it together."""
        if self.ds_engine.zero_optimization_stage() == 3:
            self.ds_engine.optimizer.empty_partition_cache()

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Sums:
        """Loss, and answers that greedy decoding would give exactly, of the state that is loaded. Call within `lockstep`."""
        total = Sums()
        self.ds_engine.eval()
        for batch in batches:
            with self._clock.stage("compute"):
                loss_sum, logits = self._loss(batch)
                labels = self._tensor(batch.labels)[:, 1:]
                right = (logits[:, :-1].argmax(-1) == labels) | (labels == -100)
                rows = (labels != -100).any(dim=1)
                total += Sums(loss_sum.item(), batch.answer_tokens, int((right.all(dim=1) & rows).sum()), int(rows.sum()))
                self._end_forward_only()
        return total

    # Words between the ranks of a client.

    def sum_over_client(self, values: np.ndarray) -> np.ndarray:
        """Sum a float64 vector over the ranks of the client."""
        if self.groups.client_size == 1:
            return values
        words = torch.from_numpy(values.copy()).to(self._device)
        dist.all_reduce(words, group=self.groups.client)
        return words.cpu().numpy()

    def share_from_gateway(self, values: np.ndarray) -> np.ndarray:
        """The gateway's vector, on every rank of the client (the gateway is its first rank)."""
        if self.groups.client_size == 1:
            return values
        words = torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
        dist.broadcast(words, self.groups.client_ranks[0], group=self.groups.client)
        return words.cpu().numpy()

    # Inside a pass.

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, dtype=np.int64)).to(self._device)

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the answer tokens' cross-entropy in fp32, logits [batch, tokens, vocabulary])."""
        logits = self.ds_engine(input_ids=self._tensor(batch.input_ids), attention_mask=self._tensor(batch.attention_mask)).logits
        labels = self._tensor(batch.labels)[:, 1:]
        loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss, logits

    def _set_lr(self, lr: float) -> None:
        for group in self.ds_engine.optimizer.param_groups:
            group["lr"] = 0.0 if group["names"] <= self._held else lr

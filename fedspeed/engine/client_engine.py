"""A rank's training engine, lent to its clients.

The engine is built once and lives as long as the run. It has client slots; a client that takes one loads the global state into the slot's
masters, resets (or restores) the optimizer, takes its local steps, and reads the masters back. So a rank holds as many adapters and
optimizers as it has client slots, however many clients it carries, and nothing is reloaded between rounds.

Where ranks gather weights from each other, every pass is a matched collective: all of them must make the same number of passes. `lockstep`
finds that number and fills up to it with passes that train nothing.
"""

import gc
import statistics
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.folded import FoldedAdapter
from fedspeed.engine.generation.interface import Generating
from fedspeed.engine.groups import Groups
from fedspeed.engine.live_bytes import LiveBytes, storage_bytes


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

# What a method may ask of an engine beside loading, evaluating and reading states.
Capability = Literal["gradients", "add_to_gradients", "perturb", "generate", "logprobs", "forward_gradients"]


class ClientEngine(Generating):
    """See the module's docstring. Built by `engine.build.build_engine`.

    Attributes:
        capabilities: what of `Capability` it is capable of.
        model: the network, for its configuration and its adapter's.
        groups: process groups of this rank.
    """

    capabilities: frozenset[Capability] = frozenset(
        {"gradients", "add_to_gradients", "perturb", "generate", "logprobs"}
    )

    def __init__(self, model: nn.Module, states: list[ClientState], groups: Groups, matched, clock):
        """
        Args:
            matched: group of the ranks that must make the same passes; None where every rank may go on alone.
        """
        self.model, self.groups = model, groups
        self._states, self._clock = states, clock
        self._matched = matched if matched is not None and dist.get_world_size(matched) > 1 else None
        self._device = torch.device(get_accelerator().current_device_name())
        self._folded = FoldedAdapter(model)
        self._counted = 0  # see device_bytes
        self._folded_then = 0  # bytes of the folded adapter among them
        self._step_s: list[float] = []  # seconds, since they were last asked for
        self._gradients_s = 0.0  # of the step under way
        self._counting: tuple[int, LiveBytes] | None = None  # in the first step: bytes that stand, and the others' count

    @property
    def client_slots(self) -> int:
        """How many clients may train at the same time."""
        return len(self._states)

    @property
    def names(self) -> list[str]:
        """Trainable parameters in the order every rank of every client agrees on."""
        return list(self._states[0].places)

    @property
    def data_share(self) -> tuple[int, int]:
        """(into how many shares the rows of a client's micro-batches are divided, this rank's share)."""
        return self.groups.client_size, self.groups.client_rank

    # A client's turn.

    def load(self, state: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor] | None = None, *,
             frozen: frozenset[str] = frozenset(), seed: int = 0, slot: int = 0) -> None:
        """Begin a turn: global `state` into masters and copies, `optimizer` state restored or (None) reset.

        Args:
            state: full fp32 tensors by name, folded ones among them (see `load_folded`).
            frozen: names that keep their value through this turn (freeze_a, alternate). Their gradient is zeroed, so that it neither
                clips the others' nor enters momentum, and their learning rate is zero, so that decay does not move them either;
                `requires_grad=False` in mid-run would not stop ZeRO from moving them.
            seed: of dropout, the turn's own: a resumed round draws the same masks.
        """
        self.load_folded(state)
        self._states[slot].load(state, optimizer, frozen, seed)

    def load_folded(self, state: dict[str, torch.Tensor]) -> None:
        """Compute from now on with the folded arrays of a global state, which are common to all clients (models.folded). A rank whose clients take no turn
        calls this itself where it computes for others."""
        self._folded.load(state)

    def state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        """Full fp32 masters on the CPU, by name."""
        return self._states[slot].state()

    def masters(self, slot: int = 0) -> dict[str, torch.Tensor]:
        """Full fp32 masters on the CPU, by name, as they are between `gradients` and `step`."""
        return self.state(slot)

    def optimizer_state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        """State of a client slot's optimizer: `<name>/<key>` tensors in full shape, and one `step`."""
        return self._states[slot].optimizer_state()

    def gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        """Add the gradients of the first `len(work)` client slots to those that wait for `step`; returns this rank's sums by slot.

        The gradient of a slot is that of the mean over its whole step's answer tokens. DeepSpeed averages over the client's ranks, so each
        rank's part of the sum is multiplied by their number. `Sums.steps` is 0: nothing moves.
        """
        if not self._counted and self._counting is None and get_accelerator().is_synchronized_device():
            live = LiveBytes()
            self._counting = storage_bytes(self._standing()), live
            live.__enter__()
        begin = time.perf_counter()
        try:
            return self._gradients(work)
        except BaseException:
            self._end_counting()
            raise
        finally:
            self._gradients_s += time.perf_counter() - begin

    def step(self, lr: float) -> list[bool]:
        """Take the optimizer step of every client slot whose gradients wait, at rate `lr`: clip, scale, move the masters.

        Returns:
            by slot, from the first one on, whether it moved: DeepSpeed leaves out a step whose gradient is not finite.
        """
        begin = time.perf_counter()
        try:
            moved = self._step(lr)
        finally:
            counted = self._end_counting()
        if not counted:
            self._step_s.append(self._gradients_s + time.perf_counter() - begin)
        self._gradients_s = 0.0
        return moved

    def train_step(self, work: Sequence[StepBatches], lr: float) -> list[Sums]:
        """Take one optimizer step of each of the first `len(work)` client slots; returns this rank's sums by slot."""
        sums = self.gradients(work)
        return [replace(own, steps=int(moved)) for own, moved in zip(sums, self.step(lr), strict=True)]

    def _end_counting(self) -> bool:
        """Note what the first step took, if this was it."""
        if self._counting is None:
            return False
        standing, live = self._counting
        live.__exit__(None, None, None)
        self._counting, self._counted, self._folded_then = None, standing + live.peak, self._folded.bytes
        return True

    @abstractmethod
    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        """See `gradients`."""

    @abstractmethod
    def _step(self, lr: float) -> list[bool]:
        """See `step`."""

    @abstractmethod
    def add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        """Add `scale` times some arrays to a client slot's gradients, between `gradients` and `step`. What is frozen stays so.

        Every rank of the client calls it with the same values.

        Args:
            arrays: full, by name, in units of the gradient of the step's mean loss.
        """

    def perturb(self, slot: int, seed: int, scale: float) -> None:
        """Add `scale` times normal numbers to the masters of a client slot, and to its working copies; not to what is frozen.

        Every rank of the client calls it. Each tensor's numbers depend on (seed, name's place in `names`), so that the same call with
        `-scale` undoes it but for rounding.
        """
        state = self.state(slot)
        for number, name in enumerate(self.names):
            if name not in self._states[slot].frozen:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
                state[name] += scale * torch.randn(state[name].shape, generator=generator)
        self._states[slot].write(state)

    @property
    def device_bytes(self) -> int:
        """The most that tensors have taken on this rank's device so far: by its allocator's count, or on a CPU by ours in the first step (0
        before it; DeepSpeed's answer for a CPU would be the whole process)."""
        if not get_accelerator().is_synchronized_device():
            return get_accelerator().max_memory_allocated()
        return self._counted and self._counted + max(0, self._folded.peak - self._folded_then)

    def _standing(self) -> list[torch.Tensor]:
        """Tensors of the device that are there between two steps; host memory that only holds what is away from the device does not count."""
        away = {t.untyped_storage()._cdata for t in self._away()}
        return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == self._device.type
                and t.untyped_storage()._cdata not in away]

    def _away(self) -> list[torch.Tensor]:
        """Host memory of tensors that are away from the device, where host and device are one."""
        return []

    @property
    @abstractmethod
    def base_bytes(self) -> int:
        """Of the whole frozen base, wherever it lies."""

    def take_step_s(self) -> float:
        """Median seconds of a step of all seats since the last call, 0 if there was none. One that was counted is not timed."""
        taken, self._step_s = self._step_s, []
        return statistics.median(taken) if taken else 0.0

    def take_loaded(self) -> int:
        """Bytes of the base that were loaded onto the device since the last call."""
        return 0

    def take_bubble(self) -> tuple[float, float]:
        """(seconds of training passes in which a stage of a pipeline did not compute, seconds of them in all), since the last call."""
        return 0.0, 0.0

    @abstractmethod
    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        """For each list of batches: loss, and answers that greedy decoding would give exactly, under the state of slot 0. Call within
        `lockstep`."""

    # Keeping step with the ranks that share the base.

    @abstractmethod
    def train_passes(self, clients: int, steps: int, accumulation: int) -> int:
        """Passes in which this rank trains `clients` clients, `steps` steps each."""

    @abstractmethod
    def eval_passes(self, work: list[list[Batch]]) -> int:
        """Passes that `evaluate(work)` makes."""

    @contextmanager
    def lockstep(self, passes: int, backward: bool):
        """Surround the `passes` forward (and backward) passes this rank is about to make; ends level with the rest of the cluster.

        The number is agreed on before the first pass: afterwards the agreement itself would meet another rank's gather.
        """
        most = self._agree(passes)
        yield
        for _ in range(most - passes):
            with self._clock.stage("idle"):
                self._idle_pass(backward)

    def _agree(self, passes: int) -> int:
        """The largest number of passes of any rank that must keep step with this one; `passes` where none does."""
        if self._matched is None:
            return passes
        word = torch.tensor([float(passes)], device=self._device)
        with self._clock.stage("idle"):
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._matched)
        return int(word.item())

    def agree_least(self, value: int) -> int:
        """The least value of the ranks that take steps together: a client's, or all that must keep step."""
        group = self._matched or (self.groups.client if self.groups.client_size > 1 else None)
        if group is None:
            return value
        word = torch.tensor([value], device=self._device)
        with self._clock.stage("idle"):
            dist.all_reduce(word, op=dist.ReduceOp.MIN, group=group)
        return int(word.item())

    @abstractmethod
    def _idle_pass(self, backward: bool) -> None:
        """A pass that only answers the cluster's collectives."""

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

    def close(self) -> None:
        """Give back what outlives the process or holds up its end."""

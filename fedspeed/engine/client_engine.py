"""A rank's training engine, lent to its clients.

The engine is built once and lives as long as the run. It has client slots; a client that takes one loads the
global state into the slot's masters, resets (or restores) the optimizer, takes its local steps, and reads the
masters back. So a rank holds as many adapters and optimizers as it has slots, however many clients it
carries, and nothing is reloaded between rounds. A local step is `gradients`, then `step`; between the two a
method may read the masters and add to the gradients.
"""

import gc
import statistics
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.capabilities import Capability, Kind, capabilities_of
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.folded import FoldedAdapter
from fedspeed.engine.generation.interface import Generating
from fedspeed.engine.groups import Groups
from fedspeed.engine.matched_passes import MatchedPasses
from fedspeed.engine.memory_counter import TensorMemoryCounter, storage_bytes
from fedspeed.models.folded import trainable


@dataclass(frozen=True)
class Sums:
    """Sums over answer tokens and rows, to be added before anything is divided. `steps` are those that moved
    the weights.
    """

    loss: float = 0.0
    tokens: int = 0
    exact: int = 0
    rows: int = 0
    steps: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.exact + other.exact,
            self.rows + other.rows,
            self.steps + other.steps,
        )

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens if self.tokens else float("nan")


class ClientEngine(MatchedPasses, Generating):
    """See the module's docstring. Built by `engine.build.build_engine`.

    Attributes:
        kind: which of the kinds of engines it is.
        model: the network, for its configuration and its adapter's.
        groups: process groups of this rank.
    """

    kind: Kind

    def __init__(self, model: nn.Module, states: list[ClientState], groups: Groups, matched_group, clock):
        """
        Args:
            matched_group: the ranks that must make the same passes; None where every rank may go on alone.
        """
        self.model = model
        self.groups = groups
        self._states = states
        self._clock = clock
        self._matched_group = (
            matched_group if matched_group is not None and dist.get_world_size(matched_group) > 1 else None
        )
        self._begin_alone()
        self._device = torch.device(get_accelerator().current_device_name())
        self._folded = FoldedAdapter(model)
        self._folded_then = 0  # bytes of the folded adapter among those that the first step counted
        self._waiting: set[int] = set()  # client slots whose gradients wait for a step
        self._live: TensorMemoryCounter | None = None  # counts the first step; see device_bytes
        self._standing_bytes = 0
        self._counted = 0
        self._halves_s = 0.0  # seconds that the step which has begun has taken so far
        self._step_s: list[float] = []  # seconds, since they were last asked for

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it is capable of, beside loading, evaluating and reading states."""
        return capabilities_of(self.kind)

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

    def load(
        self,
        state: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor] | None = None,
        *,
        frozen: frozenset[str] = frozenset(),
        seed: int = 0,
        slot: int = 0,
    ) -> None:
        """Begin a turn: global `state` into masters and copies, `optimizer` state restored or (None) reset.
        Gradients that wait in the slot are forgotten.

        Args:
            state: full fp32 tensors by name, folded ones among them (see `load_folded`).
            frozen: names that keep their value through this turn (freeze_a, alternate). Their gradient is
                zeroed, so that it neither clips the others' nor enters momentum, and their learning rate is
                zero, so that decay does not move them either; `requires_grad=False` in mid-run would not stop
                ZeRO from moving them.
            seed: of dropout, the turn's own: a resumed round draws the same masks.
        """
        if slot in self._waiting:
            self._waiting.discard(slot)
            self._forget(slot)
        self.load_folded(state)
        self._load(slot, trainable(state), optimizer, frozen, seed)

    @abstractmethod
    def _forget(self, slot: int) -> None:
        """Let go of the gradients that wait in a slot; what it moves is loaded anew."""

    def _load(
        self,
        slot: int,
        state: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor] | None,
        frozen: frozenset[str],
        seed: int,
    ) -> None:
        """See `load`."""
        self._states[slot].load(state, optimizer, frozen, seed)

    def load_folded(self, state: dict[str, torch.Tensor]) -> None:
        """Compute from now on with the folded arrays of a global state, which are common to all clients
        (models.folded). A rank whose clients take no turn calls this itself where it computes for others.
        """
        self._folded.load(state)

    def state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        """Read the full fp32 masters onto the CPU, by name. Collective over the client."""
        return self._states[slot].state()

    def masters(self, slot: int = 0) -> dict[str, torch.Tensor]:
        """Read the same as `state`, between `gradients` and `step`."""
        return self.state(slot)

    def optimizer_state(self, slot: int = 0) -> dict[str, torch.Tensor]:
        """Read the optimizer's state onto the CPU, as `load` takes it. Collective over the client."""
        return self._states[slot].optimizer_state()

    def gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        """Compute gradients of each of the first `len(work)` client slots, and add them to those that wait
        there; returns this rank's sums by slot, of no steps.

        The gradient of a slot is that of the mean over its whole step's answer tokens. DeepSpeed averages
        over the client's ranks, so each rank's part of the sum is multiplied by their number.
        """
        assert 0 < len(work) <= self.client_slots, f"{len(work)} clients for {self.client_slots} slots"
        with self._measured():
            sums = self._gradients(work)
        self._waiting.update(range(len(work)))
        return sums

    def add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        """Add to the gradients that wait in a slot: that of the mean loss grows by `scale` times `arrays`,
        once however many ranks the client has. Where none wait, it counts from zero. Alike on all ranks of
        the client.

        Args:
            arrays: full fp32 tensors by name; zero where a name is missing. What is frozen stays so.
        """
        unknown = sorted(arrays.keys() - set(self.names))
        assert not unknown, f"add_to_gradients: nothing that trains is called {unknown[0]}"
        self._add_to_gradients(slot, arrays, scale)
        self._waiting.add(slot)

    def step(self, lr: float) -> list[bool]:
        """Take an optimizer step in each slot whose gradients wait, in the slots' order: reduce, clip, scale,
        move.

        Returns:
            by such slot, whether its masters moved: DeepSpeed leaves out a step whose gradient is not finite.
        """
        assert self._waiting, "step: no gradients wait; call gradients before it"
        slots = sorted(self._waiting)
        self._waiting = set()
        with self._measured():
            moved = self._step(slots, lr)
        if self._live is not None:
            self._counted = self._standing_bytes + self._live.peak
            self._live = None
            self._folded_then = self._folded.bytes
        else:
            self._step_s.append(self._halves_s)
        self._halves_s = 0.0
        return moved

    def train_step(self, work: Sequence[StepBatches], lr: float) -> list[Sums]:
        """Take one local step of each of the first `len(work)` client slots; returns this rank's sums by
        slot.
        """
        sums = self.gradients(work)
        return [replace(own, steps=int(moved)) for own, moved in zip(sums, self.step(lr), strict=True)]

    def perturb(self, slot: int, seed: int, scale: float) -> None:
        """Move a slot's masters and working copies by `scale` times a standard normal direction, which (seed,
        name, shape) name (`engine.directions`): the same on every rank of the client. What is frozen
        stays.
        """
        self._states[slot].perturb(seed, scale)

    @abstractmethod
    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        """See `gradients`."""

    @abstractmethod
    def _add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        """See `add_to_gradients`."""

    @abstractmethod
    def _step(self, slots: Sequence[int], lr: float) -> list[bool]:
        """See `step`."""

    @contextmanager
    def _measured(self):
        """Half of a step: its seconds, or on a CPU in the first step its memory."""
        if self._live is None and not self._counted and get_accelerator().is_synchronized_device():
            self._standing_bytes, self._live = storage_bytes(self._standing()), TensorMemoryCounter()
        begin = time.perf_counter()
        with self._live or nullcontext():
            yield
        self._halves_s += time.perf_counter() - begin

    @property
    def device_bytes(self) -> int:
        """The most that tensors have taken on this rank's device so far: by its allocator's count, or on a
        CPU by ours in the first step (0 before it; DeepSpeed's answer for a CPU would be the whole
        process).
        """
        if not get_accelerator().is_synchronized_device():
            return get_accelerator().max_memory_allocated()
        return self._counted and self._counted + max(0, self._folded.peak - self._folded_then)

    def _standing(self) -> list[torch.Tensor]:
        """Tensors of the device that are there between two steps; host memory that only holds what is away
        from the device does not count.
        """
        away = {t.untyped_storage()._cdata for t in self._away()}
        return [
            t
            for t in gc.get_objects()
            if issubclass(type(t), torch.Tensor)
            and t.device.type == self._device.type
            and t.untyped_storage()._cdata not in away
        ]

    def _away(self) -> list[torch.Tensor]:
        """Host memory of tensors that are away from the device, where host and device are one."""
        return []

    @property
    @abstractmethod
    def base_bytes(self) -> int:
        """Of the whole frozen base, wherever it lies."""

    def take_step_s(self) -> float:
        """Median seconds of a step of all client slots since the last call, 0 if there was none. One that was
        counted is not timed.
        """
        taken = self._step_s
        self._step_s = []
        return statistics.median(taken) if taken else 0.0

    def take_loaded(self) -> int:
        """Bytes of the base that were loaded onto the device since the last call."""
        return 0

    def take_bubble(self) -> tuple[float, float]:
        """(seconds of training passes in which a stage of a pipeline did not compute, seconds of them in
        all), since the last call.
        """
        return 0.0, 0.0

    @abstractmethod
    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        """For each list of batches: loss, and answers that greedy decoding would give exactly, under the
        state of client slot 0. Call within `matched_passes`.
        """

    # Keeping step with the ranks that share the base.

    @abstractmethod
    def train_passes(
        self, clients: int, steps: int, accumulation: int, *, gradients: int = 1, reads: int = 0
    ) -> int:
        """Passes in which this rank trains `clients` clients, `steps` steps each.

        Args:
            gradients: calls of `gradients` before each step. reads: calls of `masters` or `state` beside the
                one at a turn's end, of each client in each step.
        """

    @abstractmethod
    def eval_passes(self, work: list[list[Batch]]) -> int:
        """Passes that `evaluate(work)` makes."""

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

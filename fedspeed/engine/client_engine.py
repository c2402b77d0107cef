"""The training engine of a rank, which its clients use one after the other, or at the same time.

The engine is built once and lives as long as the run. It has client slots. A client that takes a slot loads
the global state into the slot's masters, resets (or restores) the optimizer, takes its local steps, and reads
the masters back. So a rank has as many adapters and optimizers as it has slots, however many clients it
carries, and the base is not reloaded between rounds. A local step is `gradients`, then `step`; between the
two a method may read the masters and add to the gradients.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.capabilities import Capability, Kind, capabilities_of
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.distil_sums import DistilSums
from fedspeed.engine.fitted_state import fitted_state
from fedspeed.engine.folded import FoldedAdapter
from fedspeed.engine.generation.interface import Generating
from fedspeed.engine.groups import Groups
from fedspeed.engine.matched_passes import MatchedPasses
from fedspeed.engine.step_measurement import StepMeasurement
from fedspeed.models.folded import trainable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sums:
    """Sums over answer tokens and rows. Add them over micro-batches and ranks before dividing.

    Attributes:
        loss: cross-entropy of the answer tokens.
        tokens: answer tokens.
        exact: rows whose whole answer greedy decoding would give.
        rows: rows that have an answer.
        steps: optimizer steps that were applied. lr_sum: their learning rates, added up.
    """

    loss: float = 0.0
    tokens: int = 0
    exact: int = 0
    rows: int = 0
    steps: int = 0
    lr_sum: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.exact + other.exact,
            self.rows + other.rows,
            self.steps + other.steps,
            lr_sum=self.lr_sum + other.lr_sum,
        )

    @property
    def mean_loss(self) -> float:
        """Loss per answer token; not a number if there are none."""
        return self.loss / self.tokens if self.tokens else float("nan")


@dataclass(frozen=True)
class ForwardDerivatives:
    """Derivatives of a client's loss along random directions.

    Attributes:
        sums: this rank's, as those of `ClientEngine.gradients`.
        derivatives: of the mean loss over all answer tokens of the client's step, along each direction: [K]
            float64, equal on all ranks of the client.
    """

    sums: Sums
    derivatives: np.ndarray

    @property
    def are_finite(self) -> bool:
        """Whether every derivative is finite. An overflow makes all of a step's estimate useless."""
        return bool(np.isfinite(self.derivatives).all())


class ClientEngine(StepMeasurement, MatchedPasses, Generating):
    """Train, evaluate and generate with one model, for the clients of this rank. `engine.build.build_engine`
    builds the engine.

    Args:
        states: the client slots.
        matched_group: the ranks that must make the same passes; None if this rank is independent of others.

    Attributes:
        kind: the kind of engine.
        model: the network, for its configuration and its adapter's.
        groups: process groups of this rank.
        elsewhere: names of trainable arrays of the global state that only engines of the other role have,
            clients or server. A state that is loaded may have them; this engine has no use for them.
    """

    kind: Kind
    elsewhere: frozenset[str] = frozenset()

    def __init__(
        self,
        model: "PreTrainedModel",
        states: list[ClientState],
        groups: Groups,
        matched_group: "ProcessGroup | None",
        clock: Clock,
    ):
        self.model = model
        self.groups = groups
        self._states = states
        self._clock = clock
        self._matched_group = (
            matched_group if matched_group is not None and dist.get_world_size(matched_group) > 1 else None
        )
        self._begin_unmatched()
        self._device = torch.device(get_accelerator().current_device_name())
        self._folded = FoldedAdapter(model)
        self._pending: set[int] = set()  # client slots with gradients that no step has used yet
        self._begin_measuring()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What a method may ask of this engine, besides loading, evaluating and reading states."""
        return capabilities_of(self.kind, self.zero_stage)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage of the trainable part; 3 in a stock engine partitions the base as well."""
        return self._states[0].ds_engine.zero_optimization_stage()

    @property
    def client_slots(self) -> int:
        """Number of clients that may train at the same time."""
        return len(self._states)

    @property
    def names(self) -> list[str]:
        """Names of the trainable tensors, in the same order on every rank of every client."""
        return list(self._states[0].slices)

    @property
    def data_share(self) -> tuple[int, int]:
        """(number of shares into which a client's rows are divided, number of this rank's share)."""
        return self.groups.client_size, self.groups.client_rank

    # Local training of a client.

    def load(
        self,
        state: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor] | None = None,
        *,
        frozen: frozenset[str] = frozenset(),
        seed: int = 0,
        slot: int = 0,
    ) -> None:
        """Begin a client's local steps: write the global `state` into masters and working copies, and restore
        the `optimizer` state or (None) reset it. Gradients that are left in the slot are dropped.

        Args:
            state: full fp32 tensors by name, including folded ones (see `load_folded`): all that the engine
                trains, and no others but those that are `elsewhere`. Its LoRA factors may have another rank
                than the engine's (`models.lora_ranks.fitted`).
            frozen: names that keep their values during these local steps (freeze_a, alternate). Their
                gradients are set to zero, so that they affect neither clipping nor momentum, and their
                learning rate is zero, so that weight decay does not change them. `requires_grad=False` during
                a run would not keep ZeRO from updating them.
            seed: of dropout, one for each client and round: a resumed round draws the same masks.
        """
        if slot in self._pending:
            self._pending.discard(slot)
            self._drop_gradients(slot)
        state = fitted_state(state, self._states[0].slices)
        self._folded.load(state)
        own = {name: value for name, value in trainable(state).items() if name not in self.elsewhere}
        unknown = sorted(own.keys() - set(self.names))
        assert not unknown, f"load: nothing that trains is called {unknown[0]}"
        self._load(slot, own, optimizer, frozen - self.elsewhere, seed)

    @abstractmethod
    def _drop_gradients(self, slot: int) -> None:
        """Drop the gradients that are left in a slot. The slot's state may change, since it is loaded
        next.
        """

    def _load(
        self, slot: int, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int
    ) -> None:
        """Load a slot; see `load`."""
        self._states[slot].load(state, optimizer, frozen, seed)

    def load_folded(self, state: dict[str, torch.Tensor]) -> None:
        """Compute from now on with the folded arrays of a global state, which are the same for all clients
        (models.folded). A rank without a client in this round calls this itself if it computes for others.
        """
        self._folded.load(fitted_state(state, self._states[0].slices))

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
        """Compute gradients for each of the first `len(work)` client slots, and add them to the gradients
        that are in the slot already; returns this rank's sums by slot, with 0 steps.

        The gradient of a slot is that of the mean loss over all answer tokens of its step. DeepSpeed averages
        over the client's ranks, so each rank multiplies its part of the sum by their number.
        """
        assert 0 < len(work) <= self.client_slots, f"{len(work)} clients for {self.client_slots} slots"
        with self.measured():
            sums = self._gradients(work)
        self._pending.update(range(len(work)))
        return sums

    def forward_gradients(
        self, work: Sequence[StepBatches], seeds: Sequence[Sequence[int]], names: Sequence[frozenset[str]]
    ) -> list[ForwardDerivatives]:
        """Compute, for each of the first `len(work)` client slots, the derivatives of its step's mean loss
        along random directions, by forward passes that save no activations (`engine.forward_mode`). Nothing
        is added to gradients: an estimate of them is the mean of derivative times direction
        (`engine.directions.combined`), for `add_to_gradients`. Collective over the client.

        All directions of a step see the same dropout masks.

        Args:
            seeds: of each slot's directions, which are standard normal (`engine.directions`).
            names: of the tensors that each slot's directions change.

        Raises:
            ModelError: an operator of the model has no forward derivative.
        """
        assert 0 < len(work) <= self.client_slots, f"{len(work)} clients for {self.client_slots} slots"
        with self.measured():
            return [
                self._forward_gradients(slot, *of_slot)
                for slot, of_slot in enumerate(zip(work, seeds, names, strict=True))
            ]

    def add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        """Add `scale` times `arrays` to the gradient of a slot's mean loss. It counts once, however many
        ranks the client has; all of them call this with the same arguments. A slot without gradients begins
        at zero.

        Args:
            arrays: full fp32 tensors by name; a missing name counts as zero. Frozen tensors stay frozen.
        """
        unknown = sorted(arrays.keys() - set(self.names))
        assert not unknown, f"add_to_gradients: nothing that trains is called {unknown[0]}"
        self._add_to_gradients(slot, arrays, scale)
        self._pending.add(slot)

    def distil(self, work: StepBatches, *, student: Sequence[int], common: int, kl: float) -> DistilSums:
        """Compute gradients in slot 0 as `gradients` does, but of how far a student is from its teacher: the
        model with some of its blocks from all of them (engine.distillation, also for the arguments). Needs
        the capability `distil`; returns this rank's sums.
        """
        raise NotImplementedError(f"an engine of kind {self.kind} is not capable of distil")

    def step(self, lr: float, *, only: Collection[int] | None = None) -> list[bool]:
        """Take an optimizer step in each slot that has gradients, in the slots' order: reduce, clip, unscale,
        update.

        Args:
            only: slots to take a step in; None: all.

        Returns:
            for each of these slots, whether the step was applied: DeepSpeed skips it if a gradient is not
            finite.
        """
        assert self._pending, "step: there are no gradients; call gradients before it"
        slots = sorted(self._pending if only is None else self._pending & set(only))
        self._pending -= set(slots)
        with self.measured():
            applied = self._step(slots, lr)
        self.end_step()
        return applied

    def train_step(self, work: Sequence[StepBatches], lr: float) -> list[Sums]:
        """Take one local step in each of the first `len(work)` client slots; returns this rank's sums by
        slot.
        """
        sums = self.gradients(work)
        steps = zip(sums, self.step(lr), strict=True)
        return [replace(slot_sums, steps=int(applied)) for slot_sums, applied in steps]

    def perturb(self, slot: int, seed: int, scale: float) -> None:
        """Add `scale` times a standard normal direction to a slot's masters and working copies. The direction
        is a function of (seed, name, shape) (`engine.directions`), hence the same on every rank of the
        client. Frozen tensors keep their values.
        """
        self._states[slot].perturb(seed, scale)

    @abstractmethod
    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        """Compute gradients; see `gradients`."""

    def _forward_gradients(
        self, slot: int, step: StepBatches, seeds: Sequence[int], names: frozenset[str]
    ) -> ForwardDerivatives:
        """Compute one slot's derivatives; see `forward_gradients`. Kinds of engines with this capability
        implement it.
        """
        raise NotImplementedError(f"a {self.kind} engine is not capable of forward_gradients")

    @abstractmethod
    def _add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        """Add arrays to gradients; see `add_to_gradients`."""

    @abstractmethod
    def _step(self, slots: Sequence[int], lr: float) -> list[bool]:
        """Take optimizer steps; see `step`."""

    @property
    @abstractmethod
    def base_bytes(self) -> int:
        """Bytes of the whole frozen base, wherever it is stored."""

    def take_loaded(self) -> int:
        """Return the bytes of the base that were loaded onto the device since the last call."""
        return 0

    def take_bubble(self) -> tuple[float, float]:
        """Return (seconds of training passes in which this pipeline stage was idle, seconds of training
        passes) since the last call.
        """
        return 0.0, 0.0

    @abstractmethod
    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        """Compute losses and exact matches for each list of batches, under the state of client slot 0. Call
        this within `matched_passes`.
        """

    # Number of passes, for `matched_passes`.

    @abstractmethod
    def train_passes(
        self, clients: int, steps: int, accumulation: int, *, gradients: int = 1, reads: int = 0
    ) -> int:
        """Return the number of passes in which this rank trains `clients` clients, `steps` steps each.

        Args:
            gradients: calls of `gradients` before each step.
            reads: calls of `masters` or `state` for each client in each step, not counting the one after the
                last step.
        """

    @abstractmethod
    def eval_passes(self, work: list[list[Batch]]) -> int:
        """Return the number of passes that `evaluate(work)` makes."""

    # Collectives of the ranks of a client.

    def sum_over_client(self, values: np.ndarray) -> np.ndarray:
        """Sum a float64 vector over the ranks of the client."""
        if self.groups.client_size == 1:
            return values
        total = torch.from_numpy(values.copy()).to(self._device)
        dist.all_reduce(total, group=self.groups.client)
        return total.cpu().numpy()

    def share_from_gateway(self, values: np.ndarray) -> np.ndarray:
        """Broadcast a vector from the gateway, which is the client's first rank, to all ranks of the
        client.
        """
        if self.groups.client_size == 1:
            return values
        shared = torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
        dist.broadcast(shared, self.groups.client_ranks[0], group=self.groups.client)
        return shared.cpu().numpy()

    def close(self) -> None:
        """Release resources that outlive the engine object."""

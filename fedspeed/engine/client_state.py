"""A client slot: the trainable tensors of the client that trains in it, with their masters, optimizer and
loss scale.
"""

from collections.abc import Mapping

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from fedspeed.engine.directions import perturbed
from fedspeed.engine.groups import Groups
from fedspeed.engine.masters import ParameterSlice, Tensors, open_masters, parameters_of

ALIGN = 64  # elements: alignment of tensors in a flat parameter, for fast matrix products


def flatten(named: Mapping[str, torch.Tensor]) -> dict[str, ParameterSlice]:
    """Return slices of one new flat parameter that contains copies of the tensors.

    An optimizer step, its reduction and its checks are then a few operations, instead of a few per tensor.
    """
    starts = {}
    end = 0
    for name, tensor in named.items():
        starts[name] = end
        end += -(-tensor.numel() // ALIGN) * ALIGN
    first = next(iter(named.values()))
    parameter = nn.Parameter(torch.zeros(end, dtype=first.dtype, device=first.device))
    slices = {name: ParameterSlice(parameter, starts[name], tensor.shape) for name, tensor in named.items()}
    for name, part in slices.items():
        part.view_in(parameter.data).copy_(named[name])
    return slices


class LossScaler:
    """The dynamic loss scale of fp16. DeepSpeed keeps one per engine. Here it starts anew whenever a client
    takes the slot, so that no client's steps depend on the previous one, and a resumed run takes the same
    steps.
    """

    def __init__(self, ds_engine: DeepSpeedEngine):
        self._optimizer = ds_engine.optimizer
        # ZeRO-0's 16-bit optimizer divides by the scale, but `engine.backward` multiplies by it for ZeRO-1 to
        # 3 only.
        self._unscaled = hasattr(self._optimizer, "loss_scale_config")
        name = "loss_scale_config" if self._unscaled else "loss_scaler"
        scaler = getattr(self._optimizer, name, None)
        self._state = vars(scaler) if scaler else {}
        self._initial = dict(self._state)

    @property
    def scale(self) -> float:
        """The factor of the next step's loss; 1 in fp32 and bf16."""
        return float(self._optimizer.loss_scale) if self._state else 1.0

    @property
    def missing_factor(self) -> float:
        """The factor that a loss still needs before `engine.backward`."""
        return self.scale if self._unscaled else 1.0

    def reset(self) -> None:
        """Set the scale and its counters to their initial values."""
        self._state.update(self._initial)


class ClientState:
    """A client slot: a DeepSpeed engine whose trainable parameters one client after another uses.

    Args:
        slices: the trainable tensors of the model among the engine's parameters, by their names in the model,
            in the same order on every rank of every client. The optimizer's groups list the tensors in them.

    Attributes:
        frozen: names of tensors that keep their values during this client's local steps.
        seed: of this client's dropout.
    """

    def __init__(self, ds_engine: DeepSpeedEngine, slices: Mapping[str, ParameterSlice], groups: Groups):
        self.ds_engine = ds_engine
        self.slices = slices
        self.parameters = parameters_of(slices.values())
        self.scaler = LossScaler(ds_engine)
        self.frozen: frozenset[str] = frozenset()
        self.seed = 0
        # Values of frozen tensors that share an optimizer group with trained ones.
        self._restored: Tensors = {}
        self._masters = open_masters(ds_engine, slices, groups)
        for parameter in self.parameters:
            inside = {name: part for name, part in slices.items() if part.parameter is parameter}
            parameter.register_hook(lambda grad, inside=inside: self._zero_frozen(grad, inside))

    def _zero_frozen(self, grad: torch.Tensor, inside: Mapping[str, ParameterSlice]) -> torch.Tensor:
        """Return a parameter's gradient with zeros for frozen tensors.

        Args:
            inside: the tensors in the parameter, by name.
        """
        frozen = [part for name, part in inside.items() if name in self.frozen]
        if not frozen:
            return grad
        grad = grad.clone(memory_format=torch.contiguous_format)
        for part in frozen:
            part.view_in(grad.view(-1)).zero_()
        return grad

    def tensors(self) -> Tensors:
        """Return the working copies by name, which a step changes in place."""
        flats = {id(parameter): parameter.data.view(-1) for parameter in self.parameters}
        return {name: part.view_in(flats[id(part.parameter)]) for name, part in self.slices.items()}

    def load(self, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int) -> None:
        """Begin a client's local steps; see `ClientEngine.load`."""
        self.frozen = frozen
        self.seed = seed
        groups = [group["names"] for group in self.ds_engine.optimizer.param_groups]
        self._restored = {
            name: state[name] for names in groups if not names <= frozen for name in names & frozen
        }
        # An idle pass on weights that have diverged leaves NaN gradients, which the next step would include.
        self.ds_engine.optimizer.zero_grad()
        self.scaler.reset()
        assert self.slices.keys() <= state.keys(), (
            f"no value for {sorted(self.slices.keys() - state.keys())[:3]}"
        )
        self._masters.write(state)
        self._masters.write_optimizer(optimizer or {})

    def state(self) -> Tensors:
        """Return the full fp32 masters on the CPU, by name; see `ClientEngine.state`."""
        return self._masters.read()

    def optimizer_state(self) -> Tensors:
        """Return the optimizer's state on the CPU, as `load` takes it."""
        return self._masters.read_optimizer()

    def perturb(self, seed: int, scale: float) -> None:
        """Add a multiple of a random direction to the masters and working copies; see `ClientEngine.perturb`.
        Collective over the client where masters are partitioned.
        """
        masters = {name: value for name, value in self._masters.read().items() if name not in self.frozen}
        self._masters.write(perturbed(masters, seed, scale))

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a loss, multiplied by the loss scale that the step divides by."""
        self.ds_engine.backward(loss * self.scaler.missing_factor, scale_wrt_gas=False)

    def step(self, lr: float) -> bool:
        """Take one optimizer step at learning rate `lr`; returns whether DeepSpeed has applied it, which it
        does not where a gradient is not finite.
        """
        for group in self.ds_engine.optimizer.param_groups:
            group["lr"] = 0.0 if group["names"] <= self.frozen else lr
        self.ds_engine.step()
        # Weight decay has changed these. A learning rate of zero would also stop the others of their group.
        if self._restored:
            self._masters.write(self._restored)
        return bool(self.ds_engine.was_step_applied())

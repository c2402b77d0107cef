"""What is a client's own while it trains: its trainable tensors, their masters and optimizer, its loss
scale.
"""

from collections.abc import Mapping

import torch
from torch import nn

from fedspeed.engine.directions import perturbed
from fedspeed.engine.masters import ParameterSlice, Tensors, open_masters, parameters_of

ALIGN = 64  # elements; where a tensor begins in a flat parameter: matrix products like aligned addresses


def flatten(named: Mapping[str, torch.Tensor]) -> dict[str, ParameterSlice]:
    """Places of some tensors in one new parameter, behind each other; it begins with their values.

    An optimizer step, its reduction and its checks then are a few operations instead of some for each tensor.
    """
    starts = {}
    end = 0
    for name, tensor in named.items():
        starts[name] = end
        end += -(-tensor.numel() // ALIGN) * ALIGN
    first = next(iter(named.values()))
    parameter = nn.Parameter(torch.zeros(end, dtype=first.dtype, device=first.device))
    places = {name: ParameterSlice(parameter, starts[name], tensor.shape) for name, tensor in named.items()}
    for name, place in places.items():
        place.of(parameter.data).copy_(named[name])
    return places


class LossScaler:
    """fp16's dynamic loss scale. DeepSpeed keeps one an engine; here it starts anew with each turn, so that
    no client's steps depend on who trained before it, and a resumed run takes the same ones.
    """

    def __init__(self, ds_engine):
        self._optimizer = ds_engine.optimizer
        # ZeRO-0's optimizer in 16 bit divides by the scale, but `engine.backward` multiplies by it for ZeRO-1
        # to 3 only.
        self._unscaled = hasattr(self._optimizer, "loss_scale_config")
        scaler = (
            self._optimizer.loss_scale_config
            if self._unscaled
            else getattr(self._optimizer, "loss_scaler", None)
        )
        self._state = vars(scaler) if scaler else {}
        self._first = dict(self._state)

    @property
    def scale(self) -> float:
        """What the next step's loss is multiplied by; 1 in fp32 and bf16."""
        return float(self._optimizer.loss_scale) if self._state else 1.0

    @property
    def missing_factor(self) -> float:
        """What a loss must still be multiplied by before `engine.backward`."""
        return self.scale if self._unscaled else 1.0

    def reset(self) -> None:
        self._state.update(self._first)


class ClientState:
    """A client slot: a DeepSpeed engine whose trainable parameters are lent to one client after another.

    Args:
        places: where the trainable tensors of the model lie among the engine's parameters, by their names in
            the model, in an order every rank of every client agrees on. The optimizer's groups name the
            tensors that are in them.
    """

    def __init__(self, ds_engine, places: Mapping[str, ParameterSlice], groups):
        self.ds_engine = ds_engine
        self.places = places
        self.parameters = parameters_of(places.values())
        self.scaler = LossScaler(ds_engine)
        self.frozen: frozenset[str] = frozenset()
        self.seed = 0
        self._kept: Tensors = {}  # what is frozen in a group of which other tensors train
        self._masters = open_masters(ds_engine, places, groups)
        for parameter in self.parameters:
            own = {name: place for name, place in places.items() if place.parameter is parameter}
            parameter.register_hook(lambda grad, own=own: self._without_frozen(grad, own))

    def _without_frozen(self, grad: torch.Tensor, own: Mapping[str, ParameterSlice]) -> torch.Tensor:
        frozen = [place for name, place in own.items() if name in self.frozen]
        if not frozen:
            return grad
        grad = grad.clone(memory_format=torch.contiguous_format)
        for place in frozen:
            place.of(grad.view(-1)).zero_()
        return grad

    def tensors(self) -> Tensors:
        """The working copies by name, which a step changes in place."""
        flats = {id(parameter): parameter.data.view(-1) for parameter in self.parameters}
        return {name: place.of(flats[id(place.parameter)]) for name, place in self.places.items()}

    def load(self, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int) -> None:
        """See `ClientEngine.load`."""
        self.frozen = frozen
        self.seed = seed
        groups = [group["names"] for group in self.ds_engine.optimizer.param_groups]
        self._kept = {name: state[name] for names in groups if not names <= frozen for name in names & frozen}
        # An idle pass on weights that diverged leaves NaN, which a step would meet.
        self.ds_engine.optimizer.zero_grad()
        self.scaler.reset()
        assert self.places.keys() <= state.keys(), (
            f"no value for {sorted(self.places.keys() - state.keys())[:3]}"
        )
        self._masters.write(state)
        self._masters.write_optimizer(optimizer or {})

    def state(self) -> Tensors:
        return self._masters.read()

    def optimizer_state(self) -> Tensors:
        return self._masters.read_optimizer()

    def perturb(self, seed: int, scale: float) -> None:
        """Move the masters and working copies along a random direction; see `ClientEngine.perturb`.
        Collective over the client where masters are partitioned.
        """
        masters = {name: value for name, value in self._masters.read().items() if name not in self.frozen}
        self._masters.write(perturbed(masters, seed, scale))

    def backward(self, loss: torch.Tensor) -> None:
        """Differentiate, with the loss scale that the step will divide by."""
        self.ds_engine.backward(loss * self.scaler.missing_factor, scale_wrt_gas=False)

    def step(self, lr: float) -> bool:
        """One optimizer step at rate `lr`. False if DeepSpeed left it out, as it does where a gradient is not
        finite.
        """
        for group in self.ds_engine.optimizer.param_groups:
            group["lr"] = 0.0 if group["names"] <= self.frozen else lr
        self.ds_engine.step()
        if self._kept:  # decay has moved it: a rate of zero would have stopped the others of its group too
            self._masters.write(self._kept)
        return bool(self.ds_engine.was_step_applied())

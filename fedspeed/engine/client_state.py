"""What is a client's own while it trains: its trainable tensors, their masters and optimizer, its loss scale."""

import torch
from torch import nn

from fedspeed.engine.masters import open_masters


class LossScaler:
    """fp16's dynamic loss scale. DeepSpeed keeps one an engine; here it starts anew with each turn, so that no client's steps depend on who
    trained before it, and a resumed run takes the same ones."""

    def __init__(self, ds_engine):
        self._optimizer = ds_engine.optimizer
        # ZeRO-0's optimizer in 16 bit divides by the scale, but `engine.backward` multiplies by it for ZeRO-1 to 3 only.
        self._unscaled = hasattr(self._optimizer, "loss_scale_config")
        scaler = self._optimizer.loss_scale_config if self._unscaled else getattr(self._optimizer, "loss_scaler", None)
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
    """A seat for one client: a DeepSpeed engine whose trainable parameters are lent to one client after another.

    Args:
        named: the engine's trainable parameters by their names in the model, in an order every rank of every client agrees on.
    """

    def __init__(self, ds_engine, named: dict[str, nn.Parameter], groups):
        self.ds_engine, self.named = ds_engine, named
        self.scaler = LossScaler(ds_engine)
        self.held: frozenset[str] = frozenset()
        self.seed = 0
        self._masters = open_masters(ds_engine, named, groups)
        for name, parameter in named.items():
            parameter.register_hook(lambda grad, name=name: torch.zeros_like(grad) if name in self.held else grad)

    def load(self, state: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor] | None, hold: frozenset[str], seed: int) -> None:
        """See `ClientEngine.load`."""
        self.held, self.seed = hold, seed
        self.ds_engine.optimizer.zero_grad()  # an idle pass on weights that diverged leaves NaN, which a step would meet
        self.scaler.reset()
        self._masters.write(state)
        self._masters.write_optimizer(optimizer or {})

    def state(self) -> dict[str, torch.Tensor]:
        return self._masters.read()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return self._masters.read_optimizer()

    def backward(self, loss: torch.Tensor) -> None:
        """Differentiate, with the loss scale that the step will divide by."""
        self.ds_engine.backward(loss * self.scaler.missing_factor, scale_wrt_gas=False)

    def step(self, lr: float) -> bool:
        """One optimizer step at rate `lr`. False if DeepSpeed left it out, as it does where a gradient is not finite."""
        for group in self.ds_engine.optimizer.param_groups:
            group["lr"] = 0.0 if group["names"] <= self.held else lr
        self.ds_engine.step()
        return bool(self.ds_engine.was_step_applied())

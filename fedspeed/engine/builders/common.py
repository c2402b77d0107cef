"""What builders of engines have in common: optimizers, client slots, and tensors on the device."""

from collections.abc import Iterable, Mapping

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from fedspeed.data.config import TrainConfig
from fedspeed.engine.client_state import ClientState, flatten
from fedspeed.engine.masters import ParameterSlice, parameters_of
from fedspeed.models.factors import is_factor_a


def make_client_slot(
    named: Mapping[str, torch.Tensor], train: TrainConfig, config: dict, *, mpu, groups
) -> ClientState:
    """Make a DeepSpeed engine over copies of what trains: LoRA's factors A in one flat parameter, all others
    in a second one.
    """
    found: dict[str, ParameterSlice] = {}
    for part in _by_factor(named):
        found |= flatten({name: named[name] for name in part})
    places = {name: found[name] for name in named}
    own = nn.ParameterList(parameters_of(places.values()))
    return ClientState(initialise(own, places, train, config, mpu=mpu), places, groups)


def initialise(
    module: nn.Module, places: Mapping[str, ParameterSlice], train: TrainConfig, config: dict, *, mpu
):
    """Make DeepSpeed's engine over a module whose trainable tensors lie at `places`."""
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=make_optimizer(places, train),
        config=config,
        mpu=mpu,
        dist_init_required=False,
        model_parameters=parameters_of(places.values()),
    )
    return engine


def make_optimizer(places: Mapping[str, ParameterSlice], train: TrainConfig) -> torch.optim.Optimizer:
    """Make the local optimizer; LoRA's A and B are groups of their own, so that one of them can be frozen."""
    groups = [
        {"params": parameters_of(places[name] for name in part), "names": frozenset(part)}
        for part in _by_factor(places)
    ]
    # The rate is set before each step. Until then it is 0: DeepSpeed takes a step without gradients to make
    # the states, which would decay.
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=train.momentum, weight_decay=train.weight_decay)
    betas = train.beta1, train.beta2
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=train.eps, weight_decay=train.weight_decay)


def put_on_device(name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Place a parameter on the device (see `models.loading.materialise`)."""
    parameter.data = parameter.data.to(get_accelerator().current_device_name())
    return parameter


def put_buffers_on_device(net: nn.Module) -> None:
    """Move a model's buffers, which are small, whatever streams."""
    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(get_accelerator().current_device_name()))


def _by_factor(names: Iterable[str]) -> list[list[str]]:
    """LoRA's factors A, and all other tensors; a part that is empty is left out."""
    factors = []
    others = []
    for name in names:
        (factors if is_factor_a(name) else others).append(name)
    return [part for part in (factors, others) if part]

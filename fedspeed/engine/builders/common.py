"""The common part of all builders: optimizers, client slots, and tensors on the device."""

from collections.abc import Collection, Iterable, Mapping

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import nn

from fedspeed.data.config import TrainConfig
from fedspeed.engine.client_state import ClientState, flatten
from fedspeed.engine.groups import ClientMpu, Groups
from fedspeed.engine.masters import ParameterSlice, parameters_of
from fedspeed.models.blocks import Anatomy
from fedspeed.models.factors import is_factor_a


def make_client_slot(
    named: Mapping[str, torch.Tensor], train: TrainConfig, config: dict, *, mpu: ClientMpu, groups: Groups
) -> ClientState:
    """Make a DeepSpeed engine over copies of the trainable tensors: LoRA's factors A in one flat parameter,
    all others in a second one.

    Args:
        named: the trainable tensors by name, in the same order on every rank of every client.
        config: the DeepSpeed section.
    """
    found: dict[str, ParameterSlice] = {}
    for names in _by_factor(named):
        found |= flatten({name: named[name] for name in names})
    slices = {name: found[name] for name in named}
    module = nn.ParameterList(parameters_of(slices.values()))
    return ClientState(initialise(module, slices, train, config, mpu=mpu), slices, groups)


def initialise(
    module: nn.Module,
    slices: Mapping[str, ParameterSlice],
    train: TrainConfig,
    config: dict,
    *,
    mpu: ClientMpu,
) -> DeepSpeedEngine:
    """Make DeepSpeed's engine over a module with the trainable tensors `slices`."""
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=make_optimizer(slices, train),
        config=config,
        mpu=mpu,
        dist_init_required=False,
        model_parameters=parameters_of(slices.values()),
    )
    return engine


def make_optimizer(slices: Mapping[str, ParameterSlice], train: TrainConfig) -> torch.optim.Optimizer:
    """Make the local optimizer. LoRA's factors A and B are separate groups, so that one of them can be
    frozen.
    """
    groups = [
        {"params": parameters_of(slices[name] for name in names), "names": frozenset(names)}
        for names in _by_factor(slices)
    ]
    # The learning rate is set before each step. It is 0 until then, because DeepSpeed takes a step without
    # gradients to make the optimizer's state, and weight decay would apply.
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=train.momentum, weight_decay=train.weight_decay)
    betas = train.beta1, train.beta2
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=train.eps, weight_decay=train.weight_decay)


def needed_parameters(
    net: nn.Module, parts: Anatomy, blocks: Collection[int], outer: dict[nn.Module, bool]
) -> set[nn.Parameter]:
    """Return the parameters that a rank needs: those of its blocks, of embedding and head if it computes
    them, and all that belong to neither (such as the final norm).

    Args:
        outer: embedding and head, and whether each is needed.
    """
    inside = {p for module in (*parts.blocks, *outer) for p in module.parameters()}
    needed = [*(parts.blocks[b] for b in blocks), *(module for module, wanted in outer.items() if wanted)]
    return {p for p in net.parameters() if p not in inside} | {
        p for module in needed for p in module.parameters()
    }


def put_on_device(name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Move a parameter to the device (see `models.loading.materialise`)."""
    parameter.data = parameter.data.to(get_accelerator().current_device_name())
    return parameter


def put_buffers_on_device(net: nn.Module) -> None:
    """Move a model's buffers, which are small, to the device."""
    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(get_accelerator().current_device_name()))


def _by_factor(names: Iterable[str]) -> list[list[str]]:
    """Divide names into LoRA's factors A and all other tensors; an empty part is left out."""
    factors: list[str] = []
    others: list[str] = []
    for name in names:
        (factors if is_factor_a(name) else others).append(name)
    return [part for part in (factors, others) if part]

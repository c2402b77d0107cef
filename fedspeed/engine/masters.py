"""Read and write the fp32 masters of the trainable parameters and their optimizer state, under any ZeRO
stage.

Federated averaging needs masters, not the 16-bit working copies: an aggregate written to the copies alone
would be rounded, and the next step would overwrite it with the old masters. The masters are stored in
different places: ZeRO-0 in fp32 has none (the parameter is its own master), ZeRO-0 in 16 bit keeps a list,
ZeRO-1 and 2 keep fragments of a flat tensor, and ZeRO-3 keeps the client's partition, possibly on NVMe.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters
from torch import nn

from fedspeed.engine.groups import Groups

Tensors = dict[str, torch.Tensor]
State = MutableMapping[str, Any]  # an optimizer's state of one tensor: tensors, and a number of steps

STATE_KEYS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class ParameterSlice:
    """Say which values of an engine's parameter are one tensor of the model: those from `start` on."""

    parameter: nn.Parameter
    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        """The first value behind the slice."""
        return self.start + self.shape.numel()

    def view_in(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of `flat`, which has all values of the parameter."""
        return flat[self.start : self.end].view(self.shape)


def whole_parameters(named: Mapping[str, nn.Parameter]) -> dict[str, ParameterSlice]:
    """Return slices of tensors that are a parameter each."""
    # ZeRO-3 leaves no values in a parameter between its uses, and records its shape.
    return {
        name: ParameterSlice(parameter, 0, getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in named.items()
    }


def parameters_of(slices: Iterable[ParameterSlice]) -> list[nn.Parameter]:
    """Return each parameter once, in the order of the slices."""
    return list({id(part.parameter): part.parameter for part in slices}.values())


def open_masters(
    engine: DeepSpeedEngine, slices: Mapping[str, ParameterSlice], groups: Groups
) -> "PlainMasters":
    """Return the view of the masters for the engine's ZeRO stage.

    Args:
        slices: the trainable tensors by name, in the same order on all ranks of a client.
    """
    kinds: dict[int, type[PlainMasters]] = {
        0: PlainMasters,
        1: FragmentMasters,
        2: FragmentMasters,
        3: PartitionMasters,
    }
    masters = kinds[engine.zero_optimization_stage()](engine, slices, groups)
    masters.prime()
    return masters


class PlainMasters:
    """Masters under ZeRO-0: whole tensors on every rank."""

    def __init__(self, engine: DeepSpeedEngine, slices: Mapping[str, ParameterSlice], groups: Groups):
        self._slices = slices
        self._base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._parameters = {id(parameter): parameter for parameter in parameters_of(slices.values())}
        self._master: dict[int, torch.Tensor] = dict(self._parameters)
        if hasattr(engine.optimizer, "fp32_groups"):  # bf16 and fp16
            for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups):
                self._master.update({id(p): m for p, m in zip(low, high)})

    def prime(self) -> None:
        """Create the optimizer's state now instead of in its first step: a resumed run restores it before."""
        for group in self._base.param_groups:
            for master in group["params"]:
                self._make_state(master)

    def _make_state(self, master: torch.Tensor) -> None:
        state = self._base.state[master]
        group = self._base.param_groups[0]
        if state:
            return
        if "betas" in group:
            state.update(
                step=torch.tensor(0.0), exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master)
            )
        elif group["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(master)

    def read(self) -> Tensors:
        """Return full fp32 masters on the CPU, by name. Collective over the client where they are
        partitioned.
        """
        return self._split({key: self._master[key].detach().float().cpu() for key in self._parameters})

    def _split(self, flats: Mapping[int, torch.Tensor]) -> Tensors:
        """Return the tensors by name, given all values of each parameter."""
        return {
            name: part.view_in(flats[id(part.parameter)].reshape(-1)).clone()
            for name, part in self._slices.items()
        }

    @torch.no_grad()
    def write(self, values: Tensors) -> None:
        """Set masters and working copies of the tensors in `values` (full, fp32, by name)."""
        for name, part in self._slices_in(values):
            part.view_in(self._master[id(part.parameter)].view(-1)).copy_(values[name])
            part.view_in(part.parameter.view(-1)).copy_(values[name])

    def _slices_in(self, values: Tensors) -> Iterator[tuple[str, ParameterSlice]]:
        """Yield the slices of the tensors in `values`, which may also contain other tensors."""
        return ((name, part) for name, part in self._slices.items() if name in values)

    def read_optimizer(self) -> Tensors:
        """Return the optimizer state as `<name>/<key>` tensors in full shape, and one `step`. Collective over
        the client where it is partitioned.
        """
        out: Tensors = {}
        for key in STATE_KEYS:
            found = {
                p: state[key].detach().cpu() for p, state in self._states() if state.get(key) is not None
            }
            if found:
                out.update({f"{name}/{key}": value for name, value in self._split(found).items()})
        for _, state in self._states():
            _read_step(state, out)
        return out

    def _states(self) -> Iterator[tuple[int, State]]:
        """Yield (parameter, the optimizer's state of its master)."""
        for key in self._parameters:
            yield key, self._base.state.get(self._master[key], {})

    @torch.no_grad()
    def write_optimizer(self, saved: Tensors) -> None:
        """Set the optimizer state to a result of `read_optimizer`; an empty dict resets it."""
        states = dict(self._states())
        for state in states.values():
            _reset(state, saved)
        for name, part in self._slices.items():
            state = states[id(part.parameter)]
            for key in STATE_KEYS:
                if state.get(key) is not None and (value := saved.get(f"{name}/{key}")) is not None:
                    part.view_in(state[key].view(-1)).copy_(value)


class FragmentMasters(PlainMasters):
    """Masters under ZeRO-1 and 2: each rank of the client has fragments of flat fp32 tensors, and a parameter
    may be spread over several ranks.
    """

    def __init__(self, engine: DeepSpeedEngine, slices: Mapping[str, ParameterSlice], groups: Groups):
        super().__init__(engine, slices, groups)
        self._client = groups.client

    @torch.no_grad()
    def _full(self, parameter: nn.Parameter, key: str | None = None) -> torch.Tensor:
        """Return all values of a parameter's masters, or of their optimizer state `key`. Collective over the
        client.
        """
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        mapping = _mapping(parameter)
        if mapping is not None:
            at = mapping.lp_fragment_address
            full.narrow(0, at.start, at.numel).copy_(self._fragment(mapping, key))
        dist.all_reduce(full, group=self._client)
        return full.cpu()

    def _fragment(self, mapping: Any, key: str | None) -> torch.Tensor:
        if key is None:
            return mapping.hp_fragment
        at = mapping.hp_fragment_address
        return self._flat_state(mapping)[key].narrow(0, at.start, at.numel)

    def _flat_state(self, mapping: Any) -> State:
        """Return the state of the flat tensor that a fragment is a view of."""
        for flat, state in self._base.state.items():
            if flat.untyped_storage().data_ptr() == mapping.hp_fragment.untyped_storage().data_ptr():
                return state
        return {}

    def _write_fragment(self, part: ParameterSlice, value: torch.Tensor, key: str | None = None) -> None:
        """Write the values of a tensor that this rank has, if it has any."""
        mapping = _mapping(part.parameter)
        if mapping is None:
            return
        at = mapping.lp_fragment_address
        start = max(part.start, at.start)
        end = min(part.end, at.start + at.numel)
        if start < end:
            values = value.reshape(-1)[start - part.start : end - part.start]
            self._fragment(mapping, key).narrow(0, start - at.start, end - start).copy_(values)

    def read(self) -> Tensors:
        return self._split({key: self._full(parameter) for key, parameter in self._parameters.items()})

    @torch.no_grad()
    def write(self, values: Tensors) -> None:
        for name, part in self._slices_in(values):
            part.view_in(part.parameter.view(-1)).copy_(values[name])
            self._write_fragment(part, values[name])

    def read_optimizer(self) -> Tensors:
        out: Tensors = {}
        for key in self._state_keys():
            found = self._split({p: self._full(parameter, key) for p, parameter in self._parameters.items()})
            out.update({f"{name}/{key}": value for name, value in found.items()})
        for state in self._base.state.values():
            _read_step(state, out)
        return out

    def _state_keys(self) -> list[str]:
        """Return the keys that any rank of the client has: a rank without a fragment joins the
        collectives.
        """
        have = torch.tensor(
            [float(any(s.get(k) is not None for s in self._base.state.values())) for k in STATE_KEYS],
            device=get_accelerator().current_device_name(),
        )
        dist.all_reduce(have, group=self._client)
        return [key for key, n in zip(STATE_KEYS, have.tolist()) if n]

    @torch.no_grad()
    def write_optimizer(self, saved: Tensors) -> None:
        for state in self._base.state.values():
            _reset(state, saved)
        for name, part in self._slices.items():
            for key in STATE_KEYS:
                if (value := saved.get(f"{name}/{key}")) is not None:
                    self._write_fragment(part, value, key)


class _Shard(NamedTuple):
    """Say which values of a sub-group's flat partition are this rank's part of a parameter."""

    name: str
    parameter: Any  # a parameter of ZeRO-3: it has ds_numel and ds_shape
    offset: int
    numel: int


class PartitionMasters(PlainMasters):
    """Masters under ZeRO-3: every parameter is partitioned evenly over the client's ranks, in sub-groups that
    may be swapped to NVMe. Each trainable tensor is a parameter of its own.
    """

    def __init__(self, engine: DeepSpeedEngine, slices: Mapping[str, ParameterSlice], groups: Groups):
        super().__init__(engine, slices, groups)
        self._zero = engine.optimizer
        self._groups = groups
        self._parameters_of: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, part in slices.items():
            group, _, _ = self._zero.grad_position[self._zero.get_param_id(part.parameter)]
            self._parameters_of.setdefault(group, []).append((name, part.parameter))

    def _sub_groups(self, write: bool) -> Iterator[tuple[torch.Tensor, State, list[_Shard]]]:
        """Yield (flat fp32 partition, its optimizer state, its shards) of every sub-group, swapped in while
        it is used.

        Args:
            write: whether changes are swapped out again.
        """
        zero = self._zero
        for group in sorted(self._parameters_of):
            swapped = zero._swappable_optimizer_subgroup(group)
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(group)
            flat = zero.fp32_partitioned_groups_flat[group]
            shards = [
                _Shard(name, p, *zero.grad_position[zero.get_param_id(p)][1:])
                for name, p in self._parameters_of[group]
            ]
            yield flat, self._base.state.get(flat, {}), shards
            if swapped:
                (zero._optimizer_states_and_gradient_swap_out if write else zero._release_swap_buffers)(group)

    def prime(self) -> None:
        for flat, _, _ in self._sub_groups(write=True):
            self._make_state(flat)

    def _whole(self, flat: torch.Tensor, shard: _Shard) -> torch.Tensor:
        """Return a full tensor on the CPU. Collective over the client."""
        size = self._groups.client_size
        values = flat.narrow(0, shard.offset, shard.numel)
        if size == 1:
            whole = values.detach().float().cpu().clone()
        else:
            # The collective needs tensors on the device, also where masters are stored in host RAM.
            values = values.detach().float().contiguous().to(get_accelerator().current_device_name())
            whole = values.new_empty(values.numel() * size)
            dist.all_gather_into_tensor(whole, values, group=self._groups.client)
            whole = whole.cpu()
        return whole[: shard.parameter.ds_numel].view(shard.parameter.ds_shape)

    def _part(self, value: torch.Tensor, numel: int) -> torch.Tensor:
        """Return this rank's part of a full tensor; the last part is padded with zeros."""
        flat = value.reshape(-1)[self._groups.client_rank * numel :][:numel]
        return torch.nn.functional.pad(flat, (0, numel - flat.numel()))

    def read(self) -> Tensors:
        out = {}
        for flat, _, shards in self._sub_groups(write=False):
            out.update({shard.name: self._whole(flat, shard) for shard in shards})
        return out

    @torch.no_grad()
    def write(self, values: Tensors) -> None:
        for flat, _, shards in self._sub_groups(write=True):
            for name, _, offset, numel in shards:
                if name in values:
                    flat.narrow(0, offset, numel).copy_(self._part(values[name], numel))
        for name, part in self._slices_in(values):  # one at a time: all of them may be the whole model
            with GatheredParameters([part.parameter], modifier_rank=0):
                part.parameter.copy_(values[name])

    def read_optimizer(self) -> Tensors:
        out: Tensors = {}
        for _, state, shards in self._sub_groups(write=False):
            for key in STATE_KEYS:
                if state.get(key) is not None:
                    out.update({f"{shard.name}/{key}": self._whole(state[key], shard) for shard in shards})
            _read_step(state, out)
        return out

    @torch.no_grad()
    def write_optimizer(self, saved: Tensors) -> None:
        for _, state, shards in self._sub_groups(write=True):
            for key in STATE_KEYS:
                if state.get(key) is None:
                    continue
                for name, _, offset, numel in shards:
                    value = saved.get(f"{name}/{key}")
                    _set(
                        state[key].narrow(0, offset, numel),
                        None if value is None else self._part(value, numel),
                    )
            _write_step(state, saved)


def _mapping(parameter: nn.Parameter) -> Any:
    """Return DeepSpeed's record of the fragment of a parameter's master on this rank; None if it has none."""
    return vars(parameter)["_hp_mapping"]


def _reset(state: State, saved: Tensors) -> None:
    """Set an optimizer's state of one tensor to zero, and its number of steps to that of `saved`."""
    for key in STATE_KEYS:
        if state.get(key) is not None:
            state[key].zero_()
    _write_step(state, saved)


def _set(target: torch.Tensor, value: torch.Tensor | None) -> None:
    if value is None:
        target.zero_()
    else:
        target.copy_(value)


def _read_step(state: State, out: Tensors) -> None:
    if "step" in state:
        out["step"] = torch.as_tensor(float(state["step"]))


def _write_step(state: State, saved: Tensors) -> None:
    if "step" in state:
        step = float(saved.get("step", 0.0))
        if torch.is_tensor(state["step"]):
            state["step"].fill_(step)
        else:
            state["step"] = type(state["step"])(step)

"""One view of the trainable weights' fp32 masters and their optimizer state, whatever ZeRO stage holds them.

Federated averaging needs masters, not the 16-bit copies: an aggregate written to the copies alone is rounded,
and at the next step
the old masters overwrite it. Where the masters live differs: ZeRO-0 in fp32 has none (the weight is its own
    master), ZeRO-0 in 16
bit keeps a list, ZeRO-1 and 2 keep fragments of a flat tensor, ZeRO-3 keeps the client's partition, possibly
on NVMe.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters

Tensors = dict[str, torch.Tensor]

STATE_KEYS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class ParameterSlice:
    """Where a tensor of the model lies among an engine's parameters: the values from `start` on of one of
    them.
    """

    parameter: torch.nn.Parameter
    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.start + self.shape.numel()

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor in `flat`, which has all values of the parameter; not a copy."""
        return flat[self.start : self.end].view(self.shape)


def whole_parameters(named: Mapping[str, torch.nn.Parameter]) -> dict[str, ParameterSlice]:
    """Places of tensors that are parameters of their own."""
    # ZeRO-3 leaves no values in a parameter between its uses, and notes its shape.
    return {
        name: ParameterSlice(parameter, 0, getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in named.items()
    }


def parameters_of(places: Iterable[ParameterSlice]) -> list[torch.nn.Parameter]:
    """Each parameter once, in the order of the places."""
    return list({id(place.parameter): place.parameter for place in places}.values())


def open_masters(engine, places: Mapping[str, ParameterSlice], groups):
    """Give the view that fits the engine. `places` has the trainable tensors by name, in the same order on
    all ranks of a client.
    """
    stage = engine.zero_optimization_stage()
    kind = PartitionMasters if stage == 3 else FragmentMasters if stage in (1, 2) else PlainMasters
    view = kind(engine, places, groups)
    view.prime()
    return view


class PlainMasters:
    """ZeRO-0: the masters are whole tensors on every rank."""

    def __init__(self, engine, places: Mapping[str, ParameterSlice], groups):
        self._places = places
        self._base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._parameters = {id(parameter): parameter for parameter in parameters_of(places.values())}
        self._master = dict(self._parameters)
        if hasattr(engine.optimizer, "fp32_groups"):  # bf16 and fp16
            for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups):
                self._master.update({id(p): m for p, m in zip(low, high)})

    def prime(self) -> None:
        """Make the optimizer's state now instead of in its first step: a resumed run restores it before
        that.
        """
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
        """Full fp32 masters on the CPU, by name. Collective over the client where they are partitioned."""
        return self._split({key: self._master[key].detach().float().cpu() for key in self._parameters})

    def _split(self, flats: Mapping[int, torch.Tensor]) -> Tensors:
        """The tensors by name, out of all values of each parameter."""
        return {
            name: place.of(flats[id(place.parameter)].reshape(-1)).clone()
            for name, place in self._places.items()
        }

    @torch.no_grad()
    def write(self, values: Tensors) -> None:
        """Set masters and working copies of those tensors that are in `values` (full, fp32, by name)."""
        for name, place in self._here(values):
            place.of(self._master[id(place.parameter)].view(-1)).copy_(values[name])
            place.of(place.parameter.view(-1)).copy_(values[name])

    def _here(self, values: Tensors) -> Iterator[tuple[str, ParameterSlice]]:
        """The places of what is in `values`, which may hold tensors of others too."""
        return ((name, place) for name, place in self._places.items() if name in values)

    def read_optimizer(self) -> Tensors:
        """Optimizer state as `<name>/<key>` tensors in full shape, and one `step`."""
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

    def _states(self) -> Iterator[tuple[int, dict]]:
        """(parameter, the optimizer's state of its master)."""
        for key in self._parameters:
            yield key, self._base.state.get(self._master[key], {})

    @torch.no_grad()
    def write_optimizer(self, saved: Tensors) -> None:
        """Set the optimizer state to what `read_optimizer` gave; an empty dict resets it."""
        states = dict(self._states())
        for state in states.values():
            _reset(state, saved)
        for name, place in self._places.items():
            state = states[id(place.parameter)]
            for key in STATE_KEYS:
                if state.get(key) is not None and (value := saved.get(f"{name}/{key}")) is not None:
                    place.of(state[key].view(-1)).copy_(value)


class FragmentMasters(PlainMasters):
    """ZeRO-1 and 2: each rank of the client holds fragments of flat fp32 tensors; a parameter may lie across
    ranks.
    """

    def __init__(self, engine, places, groups):
        super().__init__(engine, places, groups)
        self._client = groups.client

    @torch.no_grad()
    def _full(self, parameter, key=None) -> torch.Tensor:
        """All values of a parameter's masters, or of their optimizer state `key`. Collective over the
        client.
        """
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        mapping = parameter._hp_mapping
        if mapping is not None:
            at = mapping.lp_fragment_address
            full.narrow(0, at.start, at.numel).copy_(self._fragment(mapping, key))
        dist.all_reduce(full, group=self._client)
        return full.cpu()

    def _fragment(self, mapping, key):
        if key is None:
            return mapping.hp_fragment
        at = mapping.hp_fragment_address
        return self._flat_state(mapping)[key].narrow(0, at.start, at.numel)

    def _flat_state(self, mapping) -> dict:
        """State of the flat tensor that a fragment is a view of."""
        for flat, state in self._base.state.items():
            if flat.untyped_storage().data_ptr() == mapping.hp_fragment.untyped_storage().data_ptr():
                return state
        return {}

    def _write_fragment(self, place: ParameterSlice, value: torch.Tensor, key=None) -> None:
        """Write the part of a tensor that this rank holds, if it holds any."""
        mapping = place.parameter._hp_mapping
        if mapping is None:
            return
        at = mapping.lp_fragment_address
        start = max(place.start, at.start)
        end = min(place.end, at.start + at.numel)
        if start < end:
            part = value.reshape(-1)[start - place.start : end - place.start]
            self._fragment(mapping, key).narrow(0, start - at.start, end - start).copy_(part)

    def read(self):
        return self._split({key: self._full(parameter) for key, parameter in self._parameters.items()})

    @torch.no_grad()
    def write(self, values):
        for name, place in self._here(values):
            place.of(place.parameter.view(-1)).copy_(values[name])
            self._write_fragment(place, values[name])

    def read_optimizer(self):
        out: Tensors = {}
        for key in self._state_keys():
            found = self._split({p: self._full(parameter, key) for p, parameter in self._parameters.items()})
            out.update({f"{name}/{key}": value for name, value in found.items()})
        for state in self._base.state.values():
            _read_step(state, out)
        return out

    def _state_keys(self) -> list[str]:
        """Keys that any rank of the client has: a rank without a fragment must still join the collectives."""
        have = torch.tensor(
            [float(any(s.get(k) is not None for s in self._base.state.values())) for k in STATE_KEYS],
            device=get_accelerator().current_device_name(),
        )
        dist.all_reduce(have, group=self._client)
        return [key for key, n in zip(STATE_KEYS, have.tolist()) if n]

    @torch.no_grad()
    def write_optimizer(self, saved):
        for state in self._base.state.values():
            _reset(state, saved)
        for name, place in self._places.items():
            for key in STATE_KEYS:
                if (value := saved.get(f"{name}/{key}")) is not None:
                    self._write_fragment(place, value, key)


class PartitionMasters(PlainMasters):
    """ZeRO-3: every parameter is cut evenly over the client's ranks, in sub-groups that may wait on NVMe.
    Each tensor is a parameter of its own.
    """

    def __init__(self, engine, places, groups):
        super().__init__(engine, places, groups)
        self._zero = engine.optimizer
        self._groups = groups
        self._parameters_of: dict[int, list[tuple[str, torch.nn.Parameter]]] = {}
        for name, place in places.items():
            group, _, _ = self._zero.grad_position[self._zero.get_param_id(place.parameter)]
            self._parameters_of.setdefault(group, []).append((name, place.parameter))

    def _sub_groups(self, write: bool):
        """(flat fp32 partition, its optimizer state, [(name, parameter, offset, numel)]) of every sub-group,
        swapped in while used.
        """
        zero = self._zero
        for group in sorted(self._parameters_of):
            swapped = zero._swappable_optimizer_subgroup(group)
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(group)
            flat = zero.fp32_partitioned_groups_flat[group]
            places = [
                (name, p, *zero.grad_position[zero.get_param_id(p)][1:])
                for name, p in self._parameters_of[group]
            ]
            yield flat, self._base.state.get(flat, {}), places
            if swapped:
                (zero._optimizer_states_and_gradient_swap_out if write else zero._release_swap_buffers)(group)

    def prime(self):
        for flat, _, _ in self._sub_groups(write=True):
            self._make_state(flat)

    def _full(self, parameter, shard: torch.Tensor) -> torch.Tensor:
        size = self._groups.client_size
        if size == 1:
            whole = shard.detach().float().cpu().clone()
        else:
            # masters that wait in host RAM travel by the accelerator's backend
            shard = shard.detach().float().contiguous().to(get_accelerator().current_device_name())
            whole = shard.new_empty(shard.numel() * size)
            dist.all_gather_into_tensor(whole, shard, group=self._groups.client)
            whole = whole.cpu()
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    def _shard(self, value: torch.Tensor, numel: int) -> torch.Tensor:
        """This rank's piece of a full tensor; the last one is padded with zeros."""
        flat = value.reshape(-1)[self._groups.client_rank * numel :][:numel]
        return torch.nn.functional.pad(flat, (0, numel - flat.numel()))

    def read(self):
        out = {}
        for flat, _, places in self._sub_groups(write=False):
            out.update({
                name: self._full(p, flat.narrow(0, offset, numel)) for name, p, offset, numel in places
            })
        return out

    @torch.no_grad()
    def write(self, values):
        for flat, _, places in self._sub_groups(write=True):
            for name, _, offset, numel in places:
                if name in values:
                    flat.narrow(0, offset, numel).copy_(self._shard(values[name], numel))
        for name, place in self._here(values):  # one at a time: all of them may be the whole model
            with GatheredParameters([place.parameter], modifier_rank=0):
                place.parameter.copy_(values[name])

    def read_optimizer(self):
        out = {}
        for _, state, places in self._sub_groups(write=False):
            for key in STATE_KEYS:
                if state.get(key) is not None:
                    out.update({
                        f"{name}/{key}": self._full(p, state[key].narrow(0, offset, numel))
                        for name, p, offset, numel in places
                    })
            _read_step(state, out)
        return out

    @torch.no_grad()
    def write_optimizer(self, saved):
        for _, state, places in self._sub_groups(write=True):
            for key in STATE_KEYS:
                if state.get(key) is None:
                    continue
                for name, _, offset, numel in places:
                    value = saved.get(f"{name}/{key}")
                    _set(
                        state[key].narrow(0, offset, numel),
                        None if value is None else self._shard(value, numel),
                    )
            _write_step(state, saved)


def _reset(state: dict, saved: dict) -> None:
    """Forget an optimizer's state of one tensor, but for the number of steps that `saved` has."""
    for key in STATE_KEYS:
        if state.get(key) is not None:
            state[key].zero_()
    _write_step(state, saved)


def _set(target: torch.Tensor, value: torch.Tensor | None) -> None:
    if value is None:
        target.zero_()
    else:
        target.copy_(value)


def _read_step(state: dict, out: dict) -> None:
    if "step" in state:
        out["step"] = torch.as_tensor(float(state["step"]))


def _write_step(state: dict, saved: dict) -> None:
    if "step" in state:
        step = float(saved.get("step", 0.0))
        if torch.is_tensor(state["step"]):
            state["step"].fill_(step)
        else:
            state["step"] = type(state["step"])(step)

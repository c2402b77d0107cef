"""The methods of federated training that a run may name in `federation.method`, and what each may be told.

A method is one module, or one folder with `method.py` and a leaf `config.py` if it has options. It is added
by a line in `METHODS`. Rules of its own, between its options and other keys, are a function of its `Config`,
which `config.check` calls: `problems(self, config) -> list of (dotted keys, why not and what to do)`.
"""

from dataclasses import dataclass, field, make_dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the configuration must know of a method. What is not said is not assumed.

    Attributes:
        module: path of the method's module, or of its folder.
        sums_only: whether sums over all clients are all that it needs. Without that, masked modes refuse it,
            and so do organisations of their own (routing.transport=tls).
        adds_deltas: whether the new state is the old one plus a mean of all clients' deltas. Staleness, kept
            local optimizers, budgets of seconds, and transforms of updates presuppose that; without it,
            unequal numbers of steps (train.local_steps_by_cluster) are not brought to one.
        server_optimizers: whether the new state less the old one is a pseudo-gradient that a server optimizer
            may step along, by name and shape.
        folds: whether its aggregate grows a folded adapter beside LoRA's (models.folded).
        server: whether it has a server, a host of the run that carries no clients (`Method.serve`,
            `Method.server_step`).
        public_rows: whether that server reads rows of its own, which federation.public_rows names.
        any_weights: whether it also works on weights that are no LoRA factors (adapter.method=blocks or
            full).
    """

    module: str
    sums_only: bool = False
    adds_deltas: bool = False
    server_optimizers: bool = False
    any_weights: bool = False
    folds: bool = False
    server: bool = False
    public_rows: bool = False


METHODS = {
    "lora_average": Entry(
        module="fedspeed.federation.methods.lora_average",
        sums_only=True,
        adds_deltas=True,
        server_optimizers=True,
        any_weights=True,
    ),
    "flexlora": Entry(module="fedspeed.federation.methods.flexlora"),
    "stack": Entry(module="fedspeed.federation.methods.stack", folds=True),
    "residual": Entry(module="fedspeed.federation.methods.residual", folds=True),
}


def is_folder(name: str) -> bool:
    """Say whether the method `name` is a folder with modules `method` and `config`, and not one module."""
    spec = find_spec(METHODS[name].module)
    return spec is not None and spec.submodule_search_locations is not None


@cache
def variant_of(name: str) -> type:
    """Return the dataclass of the method `name`, one variant of the union `federation.method`.

    The variant of a method that is one module has no options but its name. No method is imported.
    """
    if is_folder(name):
        return import_module(f"{METHODS[name].module}.config").Config
    kind = Literal[name]
    # A configuration that is handed to another process is pickled, and pickle finds a class by its name in a
    # module, where one that is made here does not stand: so a variant is pickled as a call of `named`.
    by_name = {"__reduce__": lambda self: (named, (self.name,))}
    return make_dataclass("Config", [("name", kind, field(default=name))], frozen=True, namespace=by_name)


def named(name: str) -> object:
    """Return the variant of the method `name` with its defaults, which `federation.method: NAME` means."""
    return variant_of(name)()

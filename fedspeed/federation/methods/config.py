"""The registry of methods of federated training (`federation.method`), and the classes of their options.

A method is one module, or one folder with `method.py` and a leaf `config.py` if it has options. Further
methods of a folder are modules in it. A line in `METHODS` registers a method; `presets/NAME.yaml` has the
settings that it was published with (config.presets). Rules between its options and other keys are a function
of the class of its options, which `config.check` calls: `problems(self, config) -> list of (dotted keys, why
not and what to do)`.
"""

from dataclasses import dataclass, field, is_dataclass, make_dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Properties of a method that decide which configurations it can be combined with. All default to False,
    which excludes the most.

    Attributes:
        module: path of the method's module, or of its folder.
        sums_only: whether it needs only sums over all clients. Methods that need more are refused in masked
            modes and between organisations (routing.transport=tls).
        adds_deltas: whether the new state is the old one plus a mean of all clients' deltas. Staleness, kept
            local optimizers, budgets of seconds and transforms of updates require it. Without it, FedNova's
            scaling is not applied to different numbers of steps (train.local_steps_by_cluster).
        server_optimizers: whether the difference of new and old state is a pseudo-gradient, with the same
            names and shapes, that a server optimizer may use.
        folds: whether its aggregate adds to a folded adapter (models.folded).
        server: whether it has a server, a host of the run without clients (`Method.serve`,
            `Method.server_step`).
        public_rows: whether that server reads the rows of federation.public_rows.
        any_weights: whether it also works on weights that are no LoRA factors (adapter.method=blocks or
            full).
        unequal_ranks: whether clients may have different LoRA ranks (adapter.rank_by_client). The class then
            takes the argument `lora_ranks`: by client, empty if all are equal.
    """

    module: str
    sums_only: bool = False
    adds_deltas: bool = False
    server_optimizers: bool = False
    any_weights: bool = False
    folds: bool = False
    server: bool = False
    public_rows: bool = False
    unequal_ranks: bool = False


_AVERAGE = Entry(
    module="fedspeed.federation.methods.lora_average.method",
    sums_only=True,
    adds_deltas=True,
    server_optimizers=True,
    any_weights=True,
)
METHODS = {
    "lora_average": replace(_AVERAGE, module="fedspeed.federation.methods.lora_average"),
    # Four methods average all clients' LoRA factors and differ in how clients train, as their presets say.
    "fedavg_lora": _AVERAGE,
    "fs_llm": replace(_AVERAGE, module="fedspeed.federation.methods.fs_llm"),
    "fs_llm_offload": replace(_AVERAGE, module="fedspeed.federation.methods.fs_llm"),
    "zero3_offload": _AVERAGE,
    "fedbiot": Entry(
        module="fedspeed.federation.methods.fedbiot",
        sums_only=True,
        adds_deltas=True,
        server_optimizers=True,
        server=True,
        public_rows=True,
    ),
    "flexlora": Entry(module="fedspeed.federation.methods.flexlora", unequal_ranks=True),
    "stack": Entry(module="fedspeed.federation.methods.stack", folds=True, unequal_ranks=True),
    "residual": Entry(module="fedspeed.federation.methods.residual", folds=True),
    "m2fedsa": Entry(module="fedspeed.federation.methods.m2fedsa", server=True),
    "fate_llm": replace(_AVERAGE, module="fedspeed.federation.methods.fate_llm"),
    "fedprox": replace(_AVERAGE, module="fedspeed.federation.methods.fedprox"),
    "scaffold": replace(_AVERAGE, module="fedspeed.federation.methods.scaffold"),
    "fedsa": replace(_AVERAGE, module="fedspeed.federation.methods.fedsa", any_weights=False),
    "fedkseed": Entry(
        module="fedspeed.federation.methods.fedkseed",
        sums_only=True,
        server_optimizers=True,
        any_weights=True,
    ),
    "spry": Entry(
        module="fedspeed.federation.methods.spry", sums_only=True, server_optimizers=True, any_weights=True
    ),
    "spry_iteration": Entry(
        module="fedspeed.federation.methods.spry.iteration", server_optimizers=True, any_weights=True
    ),
}


def is_folder(name: str) -> bool:
    """Return whether the method `name` is a folder with modules `method` and `config`, not one module."""
    spec = find_spec(METHODS[name].module)
    return spec is not None and spec.submodule_search_locations is not None


@cache
def variant_of(name: str) -> type:
    """Return the dataclass of the options of the method `name`, one member of the union `federation.method`.

    It is the class in the `config.py` of the method's folder whose field `name` is the method's. A method
    without one has no options besides its name. No method is imported.
    """
    module = METHODS[name].module
    folder = module if is_folder(name) else module.rpartition(".")[0]
    found = vars(import_module(f"{folder}.config")) if find_spec(f"{folder}.config") else {}
    for options in found.values():
        if isinstance(options, type) and is_dataclass(options) and getattr(options, "name", None) == name:
            return options
    literal: Any = Literal  # of a value that is known at run time only
    # Configurations are pickled for other processes. Pickle finds a class by its name in a module, and this
    # class is in none, so an instance is pickled as a call of `default_options`.
    by_name = {"__reduce__": lambda self: (default_options, (self.name,))}
    name_type = literal[name]
    return make_dataclass(
        "Config", [("name", name_type, field(default=name))], frozen=True, namespace=by_name
    )


def default_options(name: str) -> object:
    """Return the default options of the method `name`, which `federation.method: NAME` stands for."""
    return variant_of(name)()


def secure_sum_of(options: Any) -> str:
    """Return the encoding of the pairwise-masked sum (routing.pairwise) that a method's options ask for;
    `none` where they ask for no sum of their own.
    """
    return getattr(options, "secure_sum", "none")

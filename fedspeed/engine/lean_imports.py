"""Import torch, transformers and PEFT without what no rank uses: 1 300 modules, two fifths of the time and a
quarter of the memory that their import takes.

FedSpeed partitions and exchanges by DeepSpeed. So transformers is told that there is no torch.distributed and
no SciPy, which only its tensor parallelism and its losses of detection models need; and it reads the folder
of its models once instead of twice. In place of torch's compiler there are stand-ins. They know what
libraries call anyway, and import the real modules once something asks for more, such as torch.compile.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import version
from types import ModuleType
from typing import Any

# Others may have other modules and ask for more of them.
TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
_COMPILER = "torch._dynamo"
_AVAILABILITY = "transformers.utils.import_utils"


def import_models() -> None:
    """Import torch, transformers and PEFT, as far as this process has not imported them yet. In other
    versions than TESTED all that comes with them is imported too.
    """
    import torch

    if any(version(name).partition("+")[0] != tested for name, tested in TESTED.items()):
        import peft  # noqa: F401
        import transformers.models.auto.modeling_auto  # noqa: F401

        return

    for package, modules in _STAND_INS.items():
        if package not in sys.modules:
            stand_ins = {name: _StandIn(package, name, contents) for name, contents in modules.items()}
            sys.modules |= stand_ins
            sys.meta_path.insert(0, _PackageFinder(package))
    setattr(torch, "_dynamo", sys.modules[_COMPILER])
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _AvailabilityFinder())
    import peft.tuners.tuners_utils
    import transformers.models.auto.modeling_auto  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if not hasattr(torch.distributed, "tensor"):  # else PEFT would look for its type
        peft.tuners.tuners_utils._torch_supports_distributed = False
    get_checkpoint_conversion_mapping("llama")  # makes a table of all models


class _StandIn(ModuleType):
    """Stands in for a module of a package, which is imported once the module is asked for more."""

    def __init__(self, package: str, name: str, contents: Mapping[str, Any]):
        super().__init__(name)
        vars(self).update(contents)
        self._package = package
        if name == package:
            self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks for these
            raise AttributeError(name)
        import_whole(self._package)
        return getattr(import_module(self.__name__), name)


def import_whole(package: str) -> ModuleType:
    """Return a package, which is imported now if there were stand-ins for it."""
    if _has_stand_ins(package):
        sys.meta_path[:] = [
            finder
            for finder in sys.meta_path
            if not (isinstance(finder, _PackageFinder) and finder.package == package)
        ]
        for name in _STAND_INS[package]:
            sys.modules.pop(name, None)
        whole = import_module(package)
        if package == _COMPILER:
            for function in _allowed:
                whole.allow_in_graph(function)
    return import_module(package)


def _has_stand_ins(package: str) -> bool:
    return isinstance(sys.modules.get(package), _StandIn)


# The functions of torch's compiler that libraries call when they are imported, and when they make an
# optimizer or a process group.

_allowed: list[Callable] = []  # functions that the compiler is told of when it is imported


def _disable(fn: Callable | None = None, recursive: bool = True, **options: Any) -> Callable:
    """Return a function that calls `fn`, which the compiler leaves alone once it has been imported."""
    if fn is None:
        return lambda function: _disable(function, recursive, **options)
    disabled: list[Callable] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if _has_stand_ins(_COMPILER):
            return fn(*args, **kwargs)
        if not disabled:
            disabled.append(import_module(_COMPILER).disable(fn, recursive, **options))
        return disabled[0](*args, **kwargs)

    return call


def _allow_in_graph(fn: Callable) -> Callable:
    """Return `fn`, and tell the compiler about it once it is imported."""
    _allowed.append(fn)
    return fn


def _assume_constant_result(fn: Callable) -> Callable:
    """Return `fn`, marked as the compiler does it."""
    setattr(fn, "_dynamo_marked_constant", True)
    return fn


def _transform_item_to_index() -> Any:
    import_whole(_COMPILER)
    return import_module(f"{_COMPILER}._trace_wrapped_higher_order_op").TransformGetItemToIndex()


def _clear_nothing() -> None:
    """Clear the compiler's caches, while there are none."""


def _break_nothing(_: str = "") -> None:
    """Break the graph that is compiled, while there is none."""


_RULES = _StandIn(_COMPILER, f"{_COMPILER}.trace_rules", {"clear_lru_cache": _clear_nothing})
# By package and module, what a stand-in knows.
_STAND_INS: dict[str, dict[str, dict[str, Any]]] = {
    _COMPILER: {
        _COMPILER: {
            "disable": _disable,
            "allow_in_graph": _allow_in_graph,
            "assume_constant_result": _assume_constant_result,
            "graph_break": _break_nothing,
            "trace_rules": _RULES,
        },
        f"{_COMPILER}._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": _transform_item_to_index},
    }
}


class _Loaded(Loader):
    """Gives the import system a module that is imported already."""

    def __init__(self, module: ModuleType):
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _PackageFinder(MetaPathFinder):
    """Imports a whole package before one of its modules for which there is no stand-in."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self.package}."):
            return None
        whole = import_whole(self.package)
        if fullname in sys.modules:
            return ModuleSpec(fullname, _Loaded(sys.modules[fullname]))
        return PathFinder.find_spec(fullname, whole.__path__)


class _AvailabilityFinder(MetaPathFinder):
    """Finds the module in which transformers asks what is installed, to change its answers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AVAILABILITY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _AvailabilityLoader(fullname, spec.origin)
        return spec


class _AvailabilityLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        scan = cache(module.create_import_structure_from_path)
        changes = {
            "is_torch_distributed_available": lambda: False,
            "is_scipy_available": lambda: False,
            "create_import_structure_from_path": lambda folder: deepcopy(scan(folder)),
        }
        for name, function in changes.items():
            assert hasattr(module, name), f"transformers has no {name} any more"
            setattr(module, name, function)

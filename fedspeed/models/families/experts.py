"""Mixtures of experts: several MLPs in each block, of which a router chooses some for every token.

In transformers a block keeps all its experts in two stacked parameters; most files hold the matrices of each
expert by themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
# Why adapter.targets names no experts, for messages.
NOT_LINEAR = "its experts and their router are stacked tensors, no linear modules, and take no LoRA"


@dataclass(frozen=True)
class Experts:
    """Describe the experts and the router that a block has in place of an MLP.

    Attributes:
        count: experts of a block, all of them stored.
        per_token: experts that compute each token.
        hidden, inner: elements a token between blocks, and inside one expert.
        path, router_path: names of the experts' module and of the router's below the block.
    """

    count: int
    per_token: int
    hidden: int
    inner: int
    path: str = "mlp.experts"
    router_path: str = "mlp.gate"

    @property
    def parameters(self) -> int:
        """Count the parameters of all experts and the router."""
        return self.count * (self._expert + self.hidden)

    @property
    def active(self) -> int:
        """Count the parameters that compute one token: its experts and the whole router."""
        return self.per_token * self._expert + self.count * self.hidden

    @property
    def _expert(self) -> int:
        """Count the parameters of one expert: gate, up and down."""
        return 3 * self.hidden * self.inner

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield the name below the block and the shape of each parameter."""
        yield f"{self.path}.gate_up_proj", (self.count, 2 * self.inner, self.hidden)
        yield f"{self.path}.down_proj", (self.count, self.hidden, self.inner)
        yield f"{self.router_path}.weight", (self.count, self.hidden)


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A parameter [experts, rows, columns] of the model that files may hold in several matrices.

    Attributes:
        parameter: the end of its name.
        matrices: ends of the names in the files of the matrices of one expert, with {} for its number.
            Behind each other along the rows, they are the expert's part of the parameter.
    """

    parameter: str
    matrices: tuple[str, ...]

    def names(self, name: str, experts: int) -> tuple[str, ...]:
        """Return the names in the files, in the order in which their rows make up the parameter `name`."""
        prefix = name.removesuffix(self.parameter)
        return tuple(prefix + end.format(e) for e in range(experts) for end in self.matrices)

    def shape(self, parameter: Shape) -> Shape:
        """Return the shape of each matrix from that of the parameter."""
        return (parameter[1] // len(self.matrices), parameter[2])


STACKED = (
    Stacked(
        parameter="mlp.experts.gate_up_proj",
        matrices=("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    ),
    Stacked(parameter="mlp.experts.down_proj", matrices=("mlp.experts.{}.down_proj.weight",)),
)

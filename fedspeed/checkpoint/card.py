"""The model card of an export, README.md: the model, its prompt in training, and how to load it."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from fedspeed.data.prompting import PromptFormat, fenced, snippet
from fedspeed.errors import ModelError

CARD_FILE = "README.md"
REMEDY = "name the folder of a finished run, or its adapter/ or model/"


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Args:
        run: name of the run. kind: `adapter` or `model`. round: of the weights; 0 for the start.
        base: a folder or a hub name. dtype: name of a torch type. format: of the prompt.
        drawn: whether the base's weights were drawn at random and are in no file.
        name: of a model that is not the common one. has_more: whether the run has such models.
    """

    run: str
    kind: str
    round: int
    base: str
    dtype: str
    format: PromptFormat
    drawn: bool = False
    name: str = ""
    has_more: bool = False

    def text(self) -> str:
        """Return the card as Markdown with its front matter."""
        facts = {
            "library_name": "peft" if self.kind == "adapter" else "transformers",
            "base_model": self.base,
            "tags": ["fedspeed", "federated-learning"],
            "fedspeed": {"template": self.format.template, "dtype": self.dtype},
        }
        code = snippet(self.kind, ".", self.base, self.dtype, self.format)
        if self.drawn and self.kind == "adapter":
            use = (
                "The base's weights were drawn at random when the run began and are in no file, so that "
                "this adapter can only be trained on."
            )
        else:
            use = f"In this folder:\n\n{fenced(code, 'python')}"
        whence = f"round {self.round}" if self.round else "the start, which no round beat"
        return (
            f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n# The {self._named()} of run "
            f"`{self.run}`, {whence}\n\n"
            f"Trained with FedSpeed from `{self.base}`.{self._beside()}\n\n## "
            f"Prompt\n\n{self.format.to_markdown()}\n\n## Use it\n\n{use}\n"
        )

    def _named(self) -> str:
        return f"{self.kind} `{self.name}`" if self.name else self.kind

    def _beside(self) -> str:
        """Describe how this model relates to the run's other models."""
        if self.name.startswith("client-"):
            return (
                f" This is client {self.name.removeprefix('client-')}'s own; the run's `{self.kind}` is "
                "what all clients have in common."
            )
        if self.name:
            return f" The run's `{self.kind}` is what all clients have in common."
        if self.has_more:
            return (
                " This is what all clients have in common. The run has other models, each in a folder "
                f"`{self.kind}-NAME`; "
                "a client's own, `client-N`, is on the client's host."
            )
        return ""


def read_card(folder: Path) -> tuple[str, str]:
    """Read the template and the dtype that an export was trained with from its card.

    Raises:
        ModelError: there is no card, or it does not name them.
    """
    path = folder / CARD_FILE
    try:
        _, front, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        facts = yaml.safe_load(front)["fedspeed"]
        return str(facts["template"]), str(facts["dtype"])
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file, but it names the prompt that the weights were trained with; {REMEDY}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ModelError(
            f"{path}: does not name the prompt that the weights were trained with ({type(error).__name__}); "
            f"{REMEDY}"
        ) from error

"""The model card of an export, README.md: the model, its prompt in training, and how to load it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedspeed.checkpoint.training_facts import LIMITS, TrainingFacts
from fedspeed.data.prompting import PromptFormat, fenced, snippet
from fedspeed.errors import ModelError
from fedspeed.hub_names import is_hub_name

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
        facts: how it was trained; None: not on the card. first_loss: held-out loss before training.
        scores: table of evaluation scores in Markdown; empty if there are none.
        origin: where the base came from, if it was imported. obtain: how to get the base where `base` is no
            name that loads anywhere; empty if it is.
        is_merged: whether the model is the base with an adapter merged into it.
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
    facts: TrainingFacts | None = None
    first_loss: float | None = None
    scores: str = ""
    origin: str = ""
    obtain: str = ""
    is_merged: bool = False

    def text(self) -> str:
        """Return the card as Markdown with its front matter."""
        values: dict[str, Any] = {
            "template": self.format.template,
            "dtype": self.dtype,
            "round": self.round,
            "name": self.name,
        }
        if self.format.chat and self.format.chat.system_prompt:
            values["system_prompt"] = self.format.chat.system_prompt
        if self.facts:
            training = {
                key: value for key, value in asdict(self.facts).items() if value not in ("", None, ())
            }
            values["training"] = training | {"client_rows": list(self.facts.client_rows)}
        facts = {
            "library_name": "peft" if self.kind == "adapter" else "transformers",
            **({"base_model": self.base} if is_hub_name(self.base) else {}),
            "tags": ["fedspeed", "federated-learning"],
            "fedspeed": values,
        }
        code = snippet(self.kind, ".", self.base, self.dtype, self.format)
        if self.drawn and self.kind == "adapter":
            use = (
                "The base's weights were drawn at random when the run began and are in no file, so that "
                "this adapter can only be trained on."
            )
        else:
            use = f"{self.obtain}In this folder:\n\n{fenced(code, 'python')}"
        whence = f"round {self.round}" if self.round else "the start, which no round beat"
        return (
            f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n# The {self._named()} of run "
            f"`{self.run}`, {whence}\n\n"
            f"Trained with FedSpeed from `{self.base}`{self._origin()}.{self._beside()}\n\n## "
            f"Prompt\n\n{self.format.to_markdown()}\n\n## Use it\n\n{use}\n{self._training()}"
        )

    def _origin(self) -> str:
        return f" ({self.origin})" if self.origin else ""

    def _training(self) -> str:
        """Return the sections on training, scores and limits."""
        sections = []
        if self.facts:
            sections.append(f"## Training\n\n{self.facts.to_markdown(self.first_loss)}")
        if self.scores:
            sections.append(f"## Scores\n\nOf this model, as FedSpeed measured them.\n\n{self.scores}")
        if sections:
            sections.append(f"## Limits\n\n{LIMITS}")
        return "".join(f"\n{section}\n" for section in sections)

    def _named(self) -> str:
        return f"{self.kind} `{self.name}`" if self.name else self.kind

    def _beside(self) -> str:
        """Describe how this model relates to the run's other models."""
        merged = " The adapter is merged into the base's weights." if self.is_merged else ""
        return merged + self._others()

    def _others(self) -> str:
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


class CardFacts(NamedTuple):
    """The prompt template and the numeric type that a card names, and the system prompt or an empty text."""

    template: str
    dtype: str
    system_prompt: str


def read_card(folder: Path) -> CardFacts:
    """Read from its card the template and the dtype that an export was trained with.

    Raises:
        ModelError: there is no card, or it does not name them.
    """
    values = card_values(folder)
    return CardFacts(str(values["template"]), str(values["dtype"]), str(values.get("system_prompt", "")))


def read_facts(folder: Path) -> TrainingFacts | None:
    """Read from its card how an export was trained; None if the card does not say.

    Raises:
        ModelError: there is no card, or it is damaged.
    """
    training = card_values(folder).get("training")
    try:
        return TrainingFacts.of(training) if isinstance(training, dict) else None
    except TypeError as error:
        raise ModelError(f"{folder / CARD_FILE}: damaged ({error}); {REMEDY}") from error


def card_values(folder: Path) -> dict[str, Any]:
    """Return the entry `fedspeed` of a card's front matter, with a template and a dtype.

    Raises:
        ModelError: there is no card, or it does not name them.
    """
    path = folder / CARD_FILE
    try:
        _, front, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        values = yaml.safe_load(front)["fedspeed"]
        return {**values, "template": values["template"], "dtype": values["dtype"]}
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file, but it names the prompt that the weights were trained with; {REMEDY}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ModelError(
            f"{path}: does not name the prompt that the weights were trained with ({type(error).__name__}); "
            f"{REMEDY}"
        ) from error

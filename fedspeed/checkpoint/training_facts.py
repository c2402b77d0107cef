"""How a model was trained and how good it is, for its model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRIVACY = {
    "plain": "updates were summed in the clear",
    "mask": "updates were masked: nobody saw more than sums",
    "mix": "updates went through relays, so that they could not be assigned to clients",
    "mix+mask": "updates were masked and went through relays: nobody saw more than sums",
}
LIMITS = (
    "- The model knows what its base knows, and may repeat what the training rows say. It was not tested for "
    "safety.\n"
    "- FedSpeed's privacy modes hide single updates during training. They do not keep the model itself from "
    "revealing rows that it has learned by heart, unless noise was added (`federation.updates`).\n"
    "- Prompts of another form than the one above were not trained."
)
CLIENTS_NAMED = 16


@dataclass(frozen=True)
class TrainingFacts:
    """How a run trained a model.

    Attributes:
        trained: what was trained, such as `LoRA r=8 on attention`.
        method: of the federation. updates: transforms of updates; may be empty.
        privacy: routing.mode. rounds: that were finished.
        task: of the data. split: how rows became clients. clients: their number.
        rows: of all clients that had an answer, held-out ones too; None if not counted.
        client_rows: of each client; empty where only sums may be known.
        held_out_loss: of the exported round; None if nothing was evaluated.
        evaluated: what it is the loss of, where that is not the exported model; else empty.
    """

    trained: str
    method: str
    privacy: str
    rounds: int
    task: str
    split: str
    clients: int
    updates: str = ""
    rows: int | None = None
    client_rows: tuple[int, ...] = ()
    held_out_loss: float | None = None
    evaluated: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TrainingFacts":
        """Return the facts that a card's front matter holds.

        Raises:
            TypeError: it lacks some, or holds others.
        """
        return cls(**{**values, "client_rows": tuple(values.get("client_rows") or ())})

    def to_markdown(self, first_loss: float | None = None) -> str:
        """Return a section of a card.

        Args:
            first_loss: held-out loss before the first round, if known.
        """
        lines = [
            f"- **Trained**: {self.trained}, in {self.rounds} rounds of {self.clients} clients",
            f"- **Method**: {self.method}" + (f"; updates: {self.updates}" if self.updates else ""),
            f"- **Privacy**: `{self.privacy}`; {PRIVACY.get(self.privacy, '')}",
            f"- **Data**: {self._data()}",
        ]
        if self.held_out_loss is not None:
            before = f", from {first_loss:.4f} before training" if first_loss is not None else ""
            of = f"; of {self.evaluated}" if self.evaluated else ""
            lines.append(f"- **Loss on held-out rows**: {self.held_out_loss:.4f}{before}{of}")
        return "\n".join(lines)

    def _data(self) -> str:
        text = f"task `{self.task}`, split `{self.split}`"
        if self.rows is None:
            return text
        text += f", {self.rows} rows with the held-out ones"
        if not self.client_rows:
            return f"{text} of all clients together"
        shown = ", ".join(map(str, self.client_rows[:CLIENTS_NAMED]))
        return f"{text} (by client: {shown}{', ...' if len(self.client_rows) > CLIENTS_NAMED else ''})"

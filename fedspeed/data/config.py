"""Configuration of the data and of clients' local training."""

from dataclasses import dataclass, field
from typing import Literal

MAX_STEPS = 1_000_000  # of a client in a round; more is taken for a typing mistake
MAX_TOKENS = 1_048_576  # of an example


FormatName = Literal["auto", "instruction", "messages", "sharegpt", "prompt_completion", "text"]
TemplateName = Literal["auto", "alpaca", "plain", "chat", "none"]


@dataclass(frozen=True)
class DataConfig:
    task: Literal["builtin", "gsm8k", "dolly", "codealpaca", "file"] = field(
        default="builtin",
        metadata={
            "help": "builtin (generated, needs no file), gsm8k, dolly, codealpaca, or file (rows of "
            "your own, docs/data.md)"
        },
    )
    path: str | tuple[str, ...] = field(
        default="",
        metadata={
            "help": (
                "files with the rows: a file, a pattern such as rows/*.jsonl, a folder, a list of these "
                "(or text with commas), or a hub data set (owner/name[:configuration]); empty: looked for "
                "in $FEDSPEED_DATA, ./data and ../shared/data"
            ),
            "path": (),
        },
    )
    held_out: str | tuple[str, ...] = field(
        default="",
        metadata={
            "help": (
                "files whose rows are all held out, named as in data.path; the clients evaluate them in "
                "turn (row i at client i modulo data.clients) and hold out none of their own rows, so that "
                "data.val_fraction and data.max_val_rows have no effect. Empty: each client holds out some "
                "of its own rows"
            ),
            "path": (),
        },
    )
    format: FormatName = field(
        default="auto",
        metadata={
            "help": (
                "task=file: how records are written. instruction: an instruction, an answer and an optional "
                "input (data.instruction_field and so on); messages: OpenAI's conversations; sharegpt: those "
                "of ShareGPT; prompt_completion: a prompt and a completion; text: a text that is trained on "
                "as a whole; auto: by the fields of the first record of each file (docs/data.md)"
            )
        },
    )
    clients: int = field(default=3, metadata={"help": "number of federated clients", "min": 1, "max": 10_000})
    split: Literal["iid", "meta", "lda", "file"] = field(
        default="iid",
        metadata={
            "help": (
                "how rows become clients. iid: shuffled evenly; meta: one category per client; lda: "
                "Dirichlet(alpha) per category; file: client k has the rows of file k of data.path, which "
                "must name as many files as there are clients"
            )
        },
    )
    alpha: float = field(
        default=0.5,
        metadata={
            "help": "concentration of split=lda: the smaller, the more the clients differ",
            "above": 0.0,
        },
    )
    instruction_field: str = field(
        default="instruction", metadata={"help": "task=file: field with the instruction"}
    )
    input_field: str = field(default="input", metadata={"help": "task=file: optional field with the input"})
    output_field: str = field(default="output", metadata={"help": "task=file: field with the answer"})
    category_field: str = field(
        default="category", metadata={"help": "task=file: field that split=meta and split=lda use"}
    )
    val_fraction: float = field(
        default=0.02,
        metadata={
            "help": (
                "share of each client's rows that is held out for evaluation; equal rows are all held "
                "out, or none"
            ),
            "min": 0.0,
            "max": 0.9,
        },
    )
    max_val_rows: int = field(
        default=64, metadata={"help": "most rows of a client that are held out", "min": 1}
    )
    max_rows: int = field(
        default=0, metadata={"help": "most rows of the task to use, 0: all (builtin: 3000)", "min": 0}
    )
    max_tokens: int = field(
        default=512,
        metadata={"help": "longest example, in tokens; see data.too_long", "min": 8, "max": MAX_TOKENS},
    )
    too_long: Literal["cut", "drop", "keep_end", "error"] = field(
        default="cut",
        metadata={
            "help": (
                "what happens to a row of more than max_tokens tokens. cut: its end is cut off; drop: it is "
                "left out; keep_end: the beginning of its prompt is cut off, behind a leading bos token "
                "(conversations of several turns and plain text: as with cut); error: it is refused"
            )
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": (
                "train on sequences of several rows, of up to data.max_tokens together; each row has "
                "positions of its own and attends to itself only. train.micro_batch then counts sequences. "
                "Held-out rows are not packed"
            )
        },
    )
    template: TemplateName = field(
        default="auto",
        metadata={
            "help": (
                "prompt template. alpaca: the Stanford Alpaca prompt; plain: instruction, input and "
                "answer with spaces between; chat: the tokenizer's chat template; none: the answer follows "
                "the prompt directly; auto: plain for task=builtin, none for rows of prompt and completion, "
                "else chat where there is a chat template, and alpaca where there is none. Rows that are "
                "plain text have no prompt and are trained on as a whole"
            )
        },
    )
    chat_template: str = field(
        default="",
        metadata={
            "help": "template=chat: jinja file of a chat template in place of the tokenizer's; it is "
            "exported with the model",
            "path": (),
        },
    )
    system_prompt: str = field(
        default="",
        metadata={"help": "template=chat: system message of conversations that have none; empty: none"},
    )

    @property
    def source(self) -> str:
        """Return the key that names the rows, with its value, for messages."""
        return f"data.path={path_text(self.path)}" if self.path else f"data.task={self.task}"


def path_text(value: str | tuple[str, ...]) -> str:
    """Return the value of data.path or data.held_out as one text, for messages."""
    return value if isinstance(value, str) else ", ".join(value)


@dataclass(frozen=True)
class TrainConfig:
    """Local training of a client. One local step is one optimizer step on `accumulation` micro-batches per
    rank.
    """

    local_steps: int = field(
        default=10,
        metadata={
            "help": "optimizer steps of a client in a round; not used with federation.round_budget=epoch",
            "min": 1,
            "max": MAX_STEPS,
        },
    )
    local_steps_by_cluster: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "other numbers of local steps for some clusters, such as {fast: 40, slow: 10}",
            "min": 1,
            "max": MAX_STEPS,
        },
    )
    micro_batch: int = field(
        default=4,
        metadata={"help": "sequences per rank in one forward and backward pass", "min": 1, "max": 65_536},
    )
    accumulation: int = field(
        default=1, metadata={"help": "micro-batches per optimizer step", "min": 1, "max": 65_536}
    )
    optimizer: Literal["adamw", "sgd"] = field(
        default="adamw", metadata={"help": "optimizer of the local steps"}
    )
    lr: float = field(
        default=1e-3, metadata={"help": "peak learning rate of the local optimizer", "min": 0.0}
    )
    momentum: float = field(
        default=0.0, metadata={"help": "momentum of optimizer=sgd", "min": 0.0, "below": 1.0}
    )
    beta1: float = field(
        default=0.9, metadata={"help": "AdamW: decay of the mean of gradients", "min": 0.0, "below": 1.0}
    )
    beta2: float = field(
        default=0.999,
        metadata={"help": "AdamW: decay of the mean of squared gradients", "min": 0.0, "below": 1.0},
    )
    eps: float = field(default=1e-8, metadata={"help": "AdamW: added to the denominator", "min": 0.0})
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay: decoupled for adamw, L2 for sgd", "min": 0.0}
    )
    clip: float = field(
        default=0.0,
        metadata={"help": "gradients are clipped to this norm in each local step, 0: never", "min": 0.0},
    )
    schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant",
        metadata={"help": "schedule of the learning rate over all rounds, not restarted in each round"},
    )
    warmup_steps: int = field(
        default=0, metadata={"help": "local steps of linear warm-up, counted over the whole run", "min": 0}
    )


def local_steps_of(train: TrainConfig, cluster: str) -> int:
    """Return the number of local steps that the clients of `cluster` take in a round."""
    return train.local_steps_by_cluster.get(cluster, train.local_steps)

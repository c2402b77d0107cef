"""How a trained model is asked: with the very prompt it was trained with. What the report, the model card and
`fedspeed chat` go by.
"""

from dataclasses import dataclass

from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt


@dataclass(frozen=True)
class PromptFormat:
    """What stands around an instruction, and the call that asks for an answer.

    Args:
        template: of `data.templates`.
        leading: ids and text of the tokens in front of every prompt, empty if there are none.
        end: id and text of the token that ends an answer.
        pad_id: of the token that fills up.
        example: a prompt as a text, and how many tokens there are left for its answer.
        chat_template: whether the tokenizer has one, which was not trained with.
    """

    template: str
    leading: tuple[tuple[int, ...], str]
    end: tuple[int, str]
    pad_id: int
    example: tuple[str, int]
    chat_template: bool = False

    def described(self) -> str:
        """The format in Markdown."""
        leading = f"the token `{self.leading[1]}`, then " if self.leading[0] else ""
        blocks = []
        for title, given in (("with an input", "{input}"), ("without one", "")):
            text = prompt(Row("{instruction}", given, "", ""), self.template)
            blocks.append(f"An instruction {title}:\n\n{fenced(text)}")
        space = (
            ", with the one space at its end"
            if prompt(Row("a", "", "", ""), self.template).endswith(" ")
            else ""
        )
        facts = (
            f"Every row was {leading}the prompt (template `{self.template}`){space}, the answer, and the "
            f"token `{self.end[1]}` at its end. "
            "The answer follows the prompt without anything between. Names of special tokens inside a text "
            "were read as text."
        )
        if self.chat_template:
            facts += " The base has a chat template; it is not exported, because nothing was trained with it."
        return "\n\n".join([facts, *blocks])


def fenced(text: str, language: str = "text") -> str:
    """A Markdown block that shows a text as it is."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def snippet(kind: str, folder: str, base: str, dtype: str, format: PromptFormat | None) -> str:
    """Python that loads an export and asks it for an answer.

    Args:
        kind: `adapter` or `model`.
        folder: of the export, from where the code is run. base: folder or hub name; only an adapter's is
            loaded.
        dtype: as torch calls it.
        format: None: the code only loads.
    """
    lines = ["import torch"]
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if format else "")
    if kind == "model":
        lines += [
            f"from transformers import {names}",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.{dtype})",
        ]
    else:
        as_trained = (
            "" if dtype == "float32" else ", autocast_adapter_dtype=False"
        )  # PEFT would compute the adapter in fp32
        lines += [
            "from peft import PeftModel",
            f"from transformers import {names}",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.{dtype})",
            f"model = PeftModel.from_pretrained(base, {folder!r}{as_trained})",
        ]
    if format:
        text, room = format.example
        leading = f"{list(format.leading[0])} + " if format.leading[0] else ""
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
            "",
            f"prompt = {text!r}",
            f"tokens = {leading}tokenizer(prompt, add_special_tokens=False, "
            "split_special_tokens=True).input_ids",
            "ids = torch.tensor([tokens])",
            "output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), "
            f"max_new_tokens={room}, do_sample=False,",
            f"                        eos_token_id={format.end[0]}, pad_token_id={format.pad_id})",
            "print(tokenizer.decode(output[0, len(tokens):], skip_special_tokens=True))",
        ]
    return "\n".join(lines)

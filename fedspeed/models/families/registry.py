"""The one list of model families."""

from importlib import import_module

from fedspeed.errors import ModelError
from fedspeed.models.families.base import Family

# Modules of this folder, each with its FAMILY; messages list the families in this order.
MODULES = (
    "llama",
    "qwen2",
    "gpt2",
    "mistral",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "smollm3",
    "granite",
)
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (import_module(f"fedspeed.models.families.{module}").FAMILY for module in MODULES)
}
# model_type -> what to do instead, of models that somebody may well try.
INSTEAD = {"gemma3": "it is the multimodal model: take its text decoder, saved as gemma3_text"}


def family_of(model_type: object, where: str) -> Family:
    """Return the family of a model.

    Args:
        model_type: as config.json has it. where: the file or the model, for the message.

    Raises:
        ModelError: FedSpeed does not train this family.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if not isinstance(model_type, str):
        raise ModelError(f"{where}: no model_type in it; give the config.json of a Hugging Face causal LM")
    instead = f" ({INSTEAD[model_type]})" if model_type in INSTEAD else ""
    raise ModelError(
        f"{where}: model_type is {model_type!r}, which FedSpeed does not train{instead}; it "
        f"trains {', '.join(FAMILIES)}. docs/extending.md says how to add a family"
    )

"""The quantised formats that `fedspeed import-base` reads, as config.json names them. No torch."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from fedspeed.errors import ModelError

QUANTISED_BY = ("quantization_config", "compression_config")
IMPORTED = ("fp8", "gptq", "awq")
GPTQ_BITS = (2, 4, 8)
AWQ_BITS = 4
# Suffixes of the tensors that together hold one weight. Each format has a tensor with the first suffix.
SUFFIXES = {
    "fp8": (".weight", ".weight_scale_inv"),
    "gptq": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "awq": (".qweight", ".qzeros", ".scales"),
}
ELSEWHERE = (
    "take the unquantised original, or dequantise the model in transformers (model.dequantize(), or "
    "dequantize=True in its quantization config), write it with save_pretrained"
)


@dataclass(frozen=True)
class Quantisation:
    """A format that can be dequantised here.

    Attributes:
        method: as config.json names it.
        bits: of a quantised value.
        group_size: inputs that share a scale and a zero point; 0: all of a matrix do.
        block: rows and columns of a matrix that share a scale; fp8 only.
        zeros_less_one: whether zero points are stored minus one, as in GPTQ's first format.
    """

    method: Literal["fp8", "gptq", "awq"]
    bits: int = 8
    group_size: int = 0
    block: tuple[int, int] = (128, 128)
    zeros_less_one: bool = False


def import_command(base: object, out: str = "FOLDER") -> str:
    """Return the command that makes a plain base of a quantised one, or of a file in another format."""
    return f"python -m fedspeed import-base {shlex.quote(str(base))} --out {out}"


def method_of(config: Mapping[str, Any]) -> str:
    """Return the name of the quantisation in a config.json: empty if there is none, and `unnamed` where it
    does not say.
    """
    for key in QUANTISED_BY:
        if (values := config.get(key)) is not None:
            method = values.get("quant_method") if isinstance(values, Mapping) else None
            return str(method or "unnamed")
    return ""


def refuse_quantised(config: Mapping[str, Any], base: object, where: str) -> None:
    """Refuse a configuration whose weights are quantised, with the command that makes a plain base of them.

    Args:
        base: its folder or hub name, for the command. where: the file, for the message.

    Raises:
        ModelError: they are quantised.
    """
    if not (method := method_of(config)):
        return
    key = next(key for key in QUANTISED_BY if config.get(key) is not None)
    remedy = ELSEWHERE
    if method in IMPORTED:
        remedy = f"dequantise them with `{import_command(base)}` and give that folder"
    raise ModelError(
        f"{where}: {key} says that the weights are quantised ({method}), which FedSpeed does not train on; "
        f"{remedy}"
    )


def quantisation_of(config: Mapping[str, Any], where: str) -> Quantisation | None:
    """Return the quantised format of a config.json; None where the weights are plain.

    Raises:
        ModelError: it is a format that `import-base` does not read.
    """
    method = method_of(config)
    if not method:
        return None
    values = config.get("quantization_config")
    if method not in IMPORTED or not isinstance(values, Mapping):
        raise ModelError(
            f"{where}: the weights are quantised by {method}, and import-base dequantises "
            f"{', '.join(IMPORTED)} only; {ELSEWHERE}, and import that folder"
        )
    if method == "fp8":
        return Quantisation("fp8", block=_block(values.get("weight_block_size"), where))
    return _of_groups(cast(Literal["gptq", "awq"], method), values, where)


def _block(block: object, where: str) -> tuple[int, int]:
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    raise ModelError(
        f"{where}: weight_block_size is {block!r}, and import-base reads fp8 with a scale for each block of "
        f"a matrix, such as [128, 128]; {ELSEWHERE}, and import that folder"
    )


def _of_groups(method: Literal["gptq", "awq"], values: Mapping[str, Any], where: str) -> Quantisation:
    bits = values.get("bits", values.get("w_bit"))
    group_size = values.get("group_size", values.get("q_group_size", 128))
    layout = str(values.get("checkpoint_format" if method == "gptq" else "version", "")).lower()
    allowed_bits = GPTQ_BITS if method == "gptq" else (AWQ_BITS,)
    layouts = ("", "gptq", "gptq_v2") if method == "gptq" else ("", "gemm")
    if bits not in allowed_bits or layout not in layouts:
        raise ModelError(
            f"{where}: {method} with bits={bits!r} and the layout {layout or 'not named'}; import-base "
            f"reads {' or '.join(map(str, allowed_bits))} bits as {' or '.join(filter(None, layouts))}. "
            f"So {ELSEWHERE}, and import that folder"
        )
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise ModelError(f"{where}: group_size is {group_size!r}, but must be -1 or at least 1")
    return Quantisation(
        method,
        bits=bits,
        group_size=max(group_size, 0),
        zeros_less_one=method == "gptq" and layout != "gptq_v2",
    )

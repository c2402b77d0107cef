"""The check of a probe's file, which `fedspeed probe` writes on a machine. Pure."""

import math
from collections.abc import Mapping

from fedspeed.errors import PlanError

REMEDY = "write it with `fedspeed probe --out FILE`"
# Section -> its keys; a key that is in the file itself has no section.
SECTIONS = {
    "device": ("name", "kind", "flops", "free_bytes", "memory_bytes_s", "host_bytes_s"),
    "ram": ("free_bytes", "bytes_s"),
    "disk": ("free_bytes", "bytes_s"),
    "link": ("loopback_bytes_s",),
}
# Keys of the device that files of earlier versions do not have.
OPTIONAL_RATES = ("down_bytes_s", "both_bytes_s", "launch_forward_s", "launch_backward_s")


def checked_probe(facts: object, where: str) -> Mapping:
    """Return the content of a probe's file once it is known to be complete and plausible.

    Args:
        facts: the parsed file.
        where: its name, for messages.

    Raises:
        PlanError: it is no probe, lacks a section or a key, or has an impossible value.
    """
    if not isinstance(facts, dict):
        raise PlanError(f"{where}: holds 0 of the {len(SECTIONS) + 1} parts of a probe; {REMEDY}")
    _check_sections(facts, where)
    device = facts["device"]
    rates = device["flops"]
    if not isinstance(rates, dict) or not rates.keys() & {"fp32", "bf16", "fp16"}:
        raise PlanError(f"{where}: device.flops has no rate of fp32, bf16 or fp16; {REMEDY}")
    block_rates = device.get("block_flops", {})
    if not isinstance(block_rates, dict) or not block_rates.keys() <= rates.keys():
        raise PlanError(
            f"{where}: device.block_flops must have rates of types that device.flops has; {REMEDY}"
        )
    for name, value in _numbers(facts).items():
        if not _is_possible(value, may_be_zero=name.endswith("free_bytes")):
            raise PlanError(f"{where}: {name} is {value!r}, but must be a number above 0; {REMEDY}")
    if not isinstance(device["name"], str) or device["kind"] not in ("gpu", "cpu"):
        raise PlanError(f"{where}: device.name must be text and device.kind gpu or cpu; {REMEDY}")
    return facts


def _check_sections(facts: Mapping, where: str) -> None:
    if not isinstance(facts.get("host"), str):
        raise PlanError(f"{where}: lacks host; {REMEDY}")
    for section, keys in SECTIONS.items():
        content = facts.get(section)
        missing = [section]
        if isinstance(content, dict):
            missing = [f"{section}.{key}" for key in keys if key not in content]
        if missing:
            raise PlanError(f"{where}: lacks {', '.join(missing)}; {REMEDY}")


def _numbers(facts: Mapping) -> dict[str, object]:
    """Return the values that must be numbers, by dotted name."""
    device = facts["device"]
    numbers = {f"device.{name}": device[name] for name in OPTIONAL_RATES if name in device}
    numbers |= {f"device.block_flops.{name}": rate for name, rate in device.get("block_flops", {}).items()}
    numbers |= {f"device.flops.{name}": rate for name, rate in device["flops"].items()}
    numbers |= {
        f"{section}.{key}": facts[section][key]
        for section, keys in SECTIONS.items()
        for key in keys
        if key.endswith(("_bytes", "_s"))
    }
    return numbers


def _is_possible(value: object, *, may_be_zero: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value > 0 or (value == 0 and may_be_zero)

"""Numbers and lists of names as text for people."""

import math
from collections.abc import Sequence


def shortened_list(names: Sequence[object], most: int) -> str:
    """Return the first `most` of some names, and how many more there are: `a, b, c and 4 more`."""
    more = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {more} more" if more > 0 else "")


def seconds_text(seconds: float) -> str:
    """Return a duration with at most two units: 0.4s, 12s, 4m 05s, 2h 10m, 3d 4h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def count_text(count: float) -> str:
    """Return a number with three significant digits, in powers of 1000: 950, 12.3k, 4.56M."""
    return _scaled(count, 1000.0, ("", "k", "M", "G", "T", "P"), "")


def parameters_text(count: int) -> str:
    """Return a parameter count with two decimals, as is usual for models: 14.77 B, 3.40 M, 117.25 k."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def bytes_text(count: float) -> str:
    """Return a size with three significant digits, in powers of 1024: 950 B, 12.3 KiB, 4.56 GiB."""
    return _scaled(count, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), " ")


def loss_text(loss: float | None) -> str:
    """Return a loss with four decimals, or a dash if it was not measured."""
    return "-" if loss is None else f"{loss:.4f}"


def _scaled(value: float, base: float, units: tuple[str, ...], space: str) -> str:
    if not math.isfinite(value):
        return f"{value}"
    index = 0
    # 999.5 would be rounded to 1000 of the same unit.
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= base
        index += 1
    if abs(value) >= 99.95 or (index == 0 and value == int(value)):
        digits = 0
    else:
        digits = 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{space}{units[index]}"

"""How figures are written: one form for a number, a share, a time, a size. Knows no artifact."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MISSING = "–"
NO_BREAK = "\N{NO-BREAK SPACE}"
SMALL = 0.01  # below it three decimals would show one digit or none


@dataclass(frozen=True)
class Figure:
    """A figure with its interval: as it is shown, and the exact value it was rounded from."""

    value: float
    text: str
    interval: str


def number(value: float) -> str:
    """Three decimals, or two significant digits when the value is small; a true minus sign."""
    text = f"{value:.3f}" if value == 0 or abs(value) >= SMALL else f"{value:.2g}"
    return text.replace("-", "−")


def share(value: float) -> str:
    """A share in [0, 1] as percent."""
    return f"{100 * value:.1f}{NO_BREAK}%".replace("-", "−")


def tenths(value: float) -> str:
    """One decimal, with thousands marked."""
    return f"{value:,.1f}".replace("-", "−")


def count(value: int) -> str:
    """A whole number with thousands marked; nothing at all as a dash."""
    return f"{value:,}" if value else MISSING


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count_bytes: int) -> str:
    """Bytes in decimal units; none as a dash."""
    value, units = float(count_bytes), ("B", "kB", "MB", "GB", "TB")
    if not count_bytes:
        return MISSING
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} {units[-1]}"


def p_value(value: float) -> str:
    """A p-value, cut off where more digits say nothing."""
    text = "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
    return text.replace(" ", NO_BREAK)


WRITERS = {"nats": number, "share": share, "tokens": tenths, "plain": number}


def figure(entry: Mapping[str, Any], kind: str) -> Figure | None:
    """`{"estimate", "low", "high"}` as shown for a measure of this kind.

    None where there is no estimate; a bound that is not defined is a dash.
    """
    if entry["estimate"] is None:
        return None
    write = WRITERS[kind]
    bounds = [entry["low"], entry["high"]]
    low, high = [MISSING if bound is None else write(bound) for bound in bounds]
    interval = "" if bounds == [None, None] else f"[{low}, {high}]"
    return Figure(entry["estimate"], write(entry["estimate"]), interval)

"""Anybody's text, made safe to print on a terminal and to write as UTF-8. Knows no row."""

import unicodedata
from typing import Any

TEXT_CHARS = 2000  # a row can hold megabytes, a page holds many samples
DELETE = 0x7F
PICTURES = 0x2400  # of the control characters below a space, in their order


def plain(value: Any) -> str:
    """A value as text that is safe to print and to write as UTF-8, cut at TEXT_CHARS.

    Rows are anybody's: an escape code would act on the terminal, and half a surrogate pair (JSON
    can say one) cannot be written at all.
    """
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    cut = text[:TEXT_CHARS]
    shown = "".join(map(_visible, cut)) if not cut.isprintable() else cut
    return shown + "…" * (len(text) > TEXT_CHARS)


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(PICTURES + code)
    unfit = unicodedata.category(character) in ("Cc", "Cs") and code >= DELETE
    return "\N{REPLACEMENT CHARACTER}" if unfit else character

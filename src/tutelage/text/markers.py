"""The markers around the chain of an answer, and the two modes of an answer.

Which markers hold is a property of a model's chat template. openPangu has tokens of its own, with
no white space next to them; all other models here learn `<think>` tags.
"""

from dataclasses import dataclass
from typing import Literal

from tutelage.core.errors import DataError

Mode = Literal["fast", "reasoning"]
THINK, END_THINK = "<think>", "</think>"
_PANGU_TURN = "[unused9]"  # opens every turn in openPangu's template, and in no other


@dataclass(frozen=True)
class Markers:
    """What stands around a chain: two tokens or tags, and the white space that belongs to them."""

    opening: str
    closing: str
    inside: str
    """Between a marker and the chain."""
    after: str
    """Between the closing marker and the answer."""

    @property
    def end_of_chain(self) -> str:
        """What follows a chain."""
        return self.inside + self.closing + self.after

    def prefix(self, mode: Mode) -> str:
        """What opens an answer, as a part of its prompt."""
        reasoning = self.opening + self.inside
        return reasoning if mode == "reasoning" else reasoning + self.end_of_chain


TAGS = Markers(THINK, END_THINK, inside="\n", after="\n\n")
PANGU_MARKERS = Markers("[unused16]", "[unused17]", inside="", after="")


def markers_of(template: str) -> Markers:
    """The think markers that belong to a chat template."""
    return PANGU_MARKERS if _PANGU_TURN in template else TAGS


def split_thinking(text: str, markers: Markers = TAGS) -> tuple[str | None, str]:
    """(chain, answer) of a text with `<think>...</think>` before its answer, or other markers.

    No marker at all: (None, text) as it is. A blank chain: (None, answer). The opening marker may
    be missing, as in answers whose prompt held it. White space next to the markers is dropped.

    Raises: DataError for all else: a chain that is not closed, a marker that comes twice, markers
    in the wrong order, words before the opening one.
    """
    opened, closed = text.count(markers.opening), text.count(markers.closing)
    if not opened and not closed:
        return None, text
    lead, _, rest = text.rpartition(markers.opening)
    chain, _, answer = rest.partition(markers.closing)
    if closed != 1 or opened > 1 or lead.strip():
        raise DataError(
            f"think markers do not pair up in {text[:40]!r} ({opened} opening, {closed} closing): "
            "write one chain between its markers, then the answer"
        )
    return chain.strip() or None, answer.lstrip()

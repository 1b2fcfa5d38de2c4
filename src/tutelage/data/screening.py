"""Which rollouts are worth a teacher's reading: what empty, looping and Delta-IFD mean.

Pure functions over one row or over figures; the models' figures come from `stages/screen.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tutelage.core.artifact import Artifact
from tutelage.data.difficulty import instruction_following_difficulty

END_TOKEN = re.compile(r"(?:<[^<>\s]+>|\[[A-Z/]+\])\Z")
"""How a token that ends an answer looks in its text: `<|im_end|>`, `</s>`, `[EOS]`."""


class Loop(NamedTuple):
    """The tail of an answer that is one run of tokens over and over."""

    period: int
    """Tokens of what is repeated."""
    tokens: int
    """Tokens of the tail; the last repetition may be cut off."""


def find_loop(
    response_ids: Sequence[int], *, period: int, repeats: int, tokens: int, same: float
) -> Loop | None:
    """The loop an answer ends in, of the shortest period up to `period`; None without one.

    The tail is a loop of period p when at least a share `same` of its tokens equal the one p
    before; it counts from `repeats` times p and from `tokens` tokens on. So a list of one sentence
    whose number rises is a loop too. Without the token that ended the answer, which the caller
    takes off.
    """
    ids_N = np.asarray(response_ids)
    for size in range(1, min(period, len(ids_N) // repeats) + 1):
        equal_N = (ids_N[size:] == ids_N[:-size])[::-1]  # from the end
        share_N = equal_N.cumsum() / np.arange(1, len(equal_N) + 1)
        least = max(tokens, repeats * size) - size  # the first time has nothing before it
        if 0 < least <= len(share_N) and share_N[least - 1] >= same:
            return Loop(size, size + 1 + int(np.flatnonzero(share_N >= same)[-1]))
    return None


def said_ids(rollout: Mapping[str, Any]) -> Sequence[int]:
    """The ids of a rollout without the token that ended it."""
    ids = rollout["response_ids"]
    return ids[:-1] if rollout["finish_reason"] == "stop" else ids


def is_empty(rollout: Mapping[str, Any]) -> bool:
    """Whether it says nothing: no token beside the one that ends it, or white space alone."""
    ended = rollout["finish_reason"] == "stop"
    text = END_TOKEN.sub("", rollout["text"]) if ended else rollout["text"]
    return not said_ids(rollout) or not text.strip()


def delta_ifd(
    teacher_N: npt.ArrayLike, teacher_alone_N: npt.ArrayLike,
    student_N: npt.ArrayLike, student_alone_N: npt.ArrayLike,
) -> np.ndarray:  # fmt: skip
    """`IFD_teacher - IFD_student`, IFD(y|x) = NLL(y|x) / NLL(y), each NLL in nats a token.

    Under 0 the prompt helps the teacher more than the student that wrote the answer; far over 0 the
    answer fits the prompt in the student's eyes alone. NaN where an NLL(y) is 0 or one is NaN.
    Source: arXiv 2605.05940; IFD: arXiv 2308.12032.
    """
    teacher = instruction_following_difficulty(teacher_N, teacher_alone_N)
    return teacher - instruction_following_difficulty(student_N, student_alone_N)


def student_of(rollouts: Artifact) -> str:
    """The fingerprint of the model that wrote them, through any number of screens."""
    written = rollouts.manifest["inputs"].get("model")
    return written["fingerprint"] if written else rollouts.summary["student"]

"""What a teacher may know that the student did not: a gold answer, an answer, a chain.

Owns how a hint is put into the prompt that the teacher reads. The student's own prompt and tokens
stay what targets are stored for: self-distillation with privileged context.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.errors import DataError
from tutelage.records import prompt_messages, read_rows
from tutelage.text.chat import ChatFormat

ANSWER, RESPONSE = "{answer}", "{response}"
SLOT = re.compile("|".join(map(re.escape, (ANSWER, RESPONSE))))

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Hints:
    """Prompts for the teacher, by the prompt's id.

    `text` is added to the last message; with `chain`, a fast answer is read behind the row's chain
    of thought. `context` is the most tokens that prompt and answer may have.
    """

    chat: ChatFormat
    rows: Mapping[str, Row]
    text: str
    chain: bool
    context: int | None

    def prompt_ids(self, rollout: Row) -> list[int] | None:
        """The ids that the teacher reads before the rollout's answer; None where there is no hint.

        That is where the row is unknown or lacks what the hint is made of, where a chain is asked
        for behind an answer that has its own, and where it would be too long for the teacher.
        Raises DataError where the row of that id is another prompt than the student answered.
        """
        row = self.rows.get(rollout["prompt_id"])
        if row is None:
            return None
        messages = prompt_messages(row)
        if self.chat.prompt_ids(messages, rollout["mode"]) != list(rollout["prompt_ids"]):
            raise DataError(
                f"hints: the prompt {rollout['prompt_id']!r} is not the one that rollout "
                f"{rollout['id']!r} answers: take hints from the rows that were answered, and a "
                "teacher with the student's chat template"
            )
        answered = row["messages"][-1] if row["messages"][-1]["role"] == "assistant" else {}
        if self.text:
            filled = self._filled({ANSWER: row["answer"], RESPONSE: answered.get("content")})
            if filled is None:
                return None
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": f"{last['content']}\n\n{filled}"}]
        if not self.chain:
            ids = self.chat.prompt_ids(messages, rollout["mode"])
        elif rollout["mode"] == "fast" and (thinking := answered.get("thinking")):
            ids = self.chat.prompt_ids(messages, "reasoning") + self.chat.chain_ids(thinking)
        else:
            return None
        length = len(ids) + len(rollout["response_ids"])
        return None if self.context and length > self.context else ids

    def _filled(self, values: Mapping[str, str | None]) -> str | None:
        """The hint's text, or None where one of its values is missing.

        In one pass: a gold answer that holds `{response}` itself is left as it is.
        """
        known = {name: value for name, value in values.items() if value and value.strip()}
        if not known.keys() >= set(SLOT.findall(self.text)):
            return None
        return SLOT.sub(lambda slot: known[slot[0]], self.text)


def hint_rows(paths: Sequence[Path], wanted: Collection[str]) -> dict[str, Row]:
    """The rows of a data or synthesize step by the prompt ids `wanted`; of several, the first.

    A synthesized row stands for the prompt it answers, and for itself where it was a prompt: the
    row of exactly that id comes before answers to it. Raises DataError where none is wanted.
    """
    wanted = set(wanted)
    exact: dict[str, Row] = {}
    answers: dict[str, Row] = {}
    first = ""
    for row in read_rows(paths):
        first = first or row["id"]
        if row["id"] in wanted:
            exact.setdefault(row["id"], row)
        if (answered := answered_id(row)) in wanted:
            answers.setdefault(answered, row)
    found = {**answers, **exact}
    if not found:
        raise DataError(
            f"hints hold none of the {len(wanted)} prompts that were answered: they begin with "
            f"{first!r}, the rollouts with {min(wanted, default='')!r}; name the rollouts' prompts "
            "or answers to them"
        )
    return found


def answered_id(row: Row) -> str:
    """The id of the prompt a conversation answers: a synthesized row's own has mode and sample
    behind it (`ID/reasoning/0`); any other row's is its own."""
    head, _, sample = row["id"].rpartition("/")
    before, _, mode = head.rpartition("/")
    behind = re.fullmatch("[0-9]+", sample) and mode == row["mode"] and before
    return before if behind else row["id"]

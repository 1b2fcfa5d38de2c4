"""What a teacher may know that the student did not: a gold answer, an answer, a chain.

Owns how a hint is put into the prompt that the teacher reads. The student's own prompt and tokens
stay what targets are stored for: self-distillation with privileged context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.records import prompt_messages, read_rows
from tutelage.text.chat import ChatFormat

ANSWER, RESPONSE = "{answer}", "{response}"


@dataclass(frozen=True)
class Hints:
    """Prompts for the teacher, by the prompt's id.

    `text` is added to the last message; with `chain`, a fast answer is read behind the row's chain
    of thought. `context` is the most tokens that prompt and answer may have.
    """

    chat: ChatFormat
    rows: Mapping[str, Mapping[str, Any]]
    text: str
    chain: bool
    context: int | None

    @classmethod
    def read(
        cls, chat: ChatFormat, paths: Sequence[Path], *, text: str, chain: bool,
        context: int | None,
    ) -> "Hints":  # fmt: skip
        """The rows of a data or synthesize step; of several answers to a prompt, the first."""
        rows: dict[str, Mapping[str, Any]] = {}
        for row in read_rows(paths):
            rows.setdefault(prompt_id(row), row)
        return cls(chat, rows, text, chain, context)

    def prompt_ids(self, rollout: Mapping[str, Any]) -> list[int] | None:
        """The ids that the teacher reads before the rollout's answer; None where there is no hint.

        That is where the row is unknown or lacks what the hint is made of, where a chain is asked
        for behind an answer that has its own, and where it would be too long for the teacher.
        """
        row = self.rows.get(rollout["prompt_id"])
        if row is None:
            return None
        messages, answered = prompt_messages(row), row["messages"][-1]
        response = answered["content"] if answered["role"] == "assistant" else None
        if self.text:
            filled = self.text
            for name, value in ((ANSWER, row["answer"]), (RESPONSE, response)):
                if name in filled:
                    if not value:
                        return None
                    filled = filled.replace(name, value)
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


def prompt_id(row: Mapping[str, Any]) -> str:
    """The id of the prompt a conversation answers: a synthesized row's own has mode and sample
    behind it (`ID/reasoning/0`)."""
    head, _, sample = row["id"].rpartition("/")
    before, _, mode = head.rpartition("/")
    return before if sample.isdigit() and mode == row["mode"] and before else row["id"]

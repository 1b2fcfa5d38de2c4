"""The tables of a data step's `filters`: one a filter, told apart by `name`.

What a filter does stands in `tutelage.data.filters`; nothing here reads a row.
"""

from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from tutelage.recipe.base import Table

NoLimitOrInt = Annotated[int, Field(ge=0)]
"""A count of tokens; 0 sets no limit."""


class LengthFilter(Table):
    """Drops rows that are too short or too long."""

    name: Literal["length"]
    min_tokens: NoLimitOrInt = 0
    """Least tokens of all messages and chains together, chat template not counted."""
    max_tokens: NoLimitOrInt = 0
    """Most tokens of all messages and chains together, chat template not counted."""
    max_prompt_tokens: NoLimitOrInt = 0
    """Most tokens up to and with the last user message."""
    max_answer_tokens: NoLimitOrInt = 0
    """Most tokens of what answers the last user message, its chain included."""

    @model_validator(mode="after")
    def _a_range(self) -> "LengthFilter":
        limits = (self.min_tokens, self.max_tokens, self.max_prompt_tokens, self.max_answer_tokens)
        if not any(limits):
            raise ValueError(
                "length sets no limit: give min_tokens, max_tokens, max_prompt_tokens "
                "or max_answer_tokens"
            )
        if self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}: swap them"
            )
        return self


class EncodingFilter(Table):
    """Drops rows whose text was decoded wrongly or holds characters that no text has."""

    name: Literal["encoding"]


class RepetitionFilter(Table):
    """Drops rows caught in a loop: of words, of lines, or of one character."""

    name: Literal["repetition"]
    ngram: Annotated[int, Field(ge=2, le=64)] = 8
    """Words (characters in Chinese and Japanese) that count as one repeated piece."""
    max_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Most n-grams of one text, as a share, that may stand there for the third time or later."""


class ThinkMarkersFilter(Table):
    """Drops rows in which think markers do not pair up, or were left in an answer or a chain."""

    name: Literal["think-markers"]


class AnswerMissingFilter(Table):
    """Drops rows that end without an answer; prompts too."""

    name: Literal["answer-missing"]


class RefusalFilter(Table):
    """Drops rows with an answer that begins like a stock refusal (en, zh, de, es, fr, ja)."""

    name: Literal["refusal"]


class LanguageFilter(Table):
    """Drops rows whose prose is in another language; code and short texts are left alone."""

    name: Literal["language"]
    keep: Annotated[tuple[Annotated[str, Field(min_length=2)], ...], Field(min_length=1)]
    """Codes of the languages to keep (`en`); `zh` and `zh-cn` both mean any Chinese."""
    min_probability: Annotated[float, Field(gt=0, le=1)] = 0.5
    """A row goes when a language outside `keep` is found with this probability or more."""
    min_characters: Annotated[int, Field(gt=0)] = 20
    """Prose with fewer letters than this is not judged."""


AnyFilter = Annotated[
    Union[  # noqa: UP007
        LengthFilter,
        EncodingFilter,
        RepetitionFilter,
        ThinkMarkersFilter,
        AnswerMissingFilter,
        RefusalFilter,
        LanguageFilter,
    ],
    Field(discriminator="name"),
]

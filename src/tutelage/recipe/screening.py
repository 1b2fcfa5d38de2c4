"""The table of the step `screen`: which rollouts are worth scoring."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tutelage.recipe.base import (
    ConversationsRef,
    ModelRef,
    PositiveInt,
    RolloutsRef,
    Share,
    Step,
)

KeepOrDrop = Literal["keep", "drop"]


class Screen(Step):
    """Takes out rollouts that are not worth a teacher's reading, each counted and put aside.

    In this order: empty, truncated, looping, verdict, and Delta-IFD, which costs most.
    """

    produces: ClassVar[str] = "rollouts"
    engine_roles: ClassVar[tuple[str, ...]] = ("teacher", "student")
    stage: Literal["screen"]
    rollouts: RolloutsRef
    student: ModelRef = ""
    """The model that wrote them. Delta-IFD reads by it, a verifier takes its tokenizer."""
    teacher: ModelRef = ""
    """Whose Delta-IFD it is: the one that will score."""
    prompts: ConversationsRef = ""
    """Rows of the same prompts, with the gold answers that a verifier judges by."""
    truncated: KeepOrDrop = "keep"
    """Answers cut off at `max_tokens`. Kept, they teach all but their end."""
    looping: KeepOrDrop = "drop"
    """Answers whose tail is one run of tokens over and over."""
    loop_same: Share = 0.9
    """Tokens of such a tail that equal the one a period before; under 1, since a loop may count
    its turns: of 64 greedy answers 16 loop exactly and 21 at 0.9; at 0.85 lists of keys do too."""
    loop_period: PositiveInt = 64
    """Most tokens of what is repeated."""
    loop_repeats: Annotated[int, Field(ge=2)] = 4
    """Times it stands there at least: people say a thing three times, and lists have rhythm."""
    loop_tokens: PositiveInt = 24
    """Tokens of the whole tail at least, or a row of dots would be a loop."""
    verifier: str = ""
    """A grader (see `synthesize`); its verdict is stored with each rollout, whatever is kept."""
    verdict: Literal["all", "correct", "wrong"] = "all"
    """Which of the graded rollouts stay. Those that cannot be graded stay always, and are
    counted."""
    delta_ifd: tuple[float, ...] = ()
    """Keep rollouts whose IFD_teacher - IFD_student lies in this range, ends included; empty: do
    not look. The paper's range is [0.0, 0.8] (arXiv 2605.05940)."""
    shard_rows: PositiveInt = 256
    logit_chunk_mb: PositiveInt = 128
    """Memory of the one chunk of logits that is alive at a time."""

    @model_validator(mode="after")
    def _what_each_filter_needs(self) -> "Screen":
        if self.delta_ifd and not (
            len(self.delta_ifd) == 2 and self.delta_ifd[0] <= self.delta_ifd[1]
        ):
            raise ValueError("delta_ifd is [least, most], as [0.0, 0.8]")
        if bool(self.delta_ifd) != bool(self.teacher):
            raise ValueError("delta_ifd and teacher go together: the range, and who reads")
        if bool(self.verifier) != bool(self.prompts):
            raise ValueError("verifier and prompts go together: the grader, and the gold answers")
        if self.verdict != "all" and not self.verifier:
            raise ValueError(f"verdict = {self.verdict!r} needs a verifier, and prompts for it")
        if (self.delta_ifd or self.verifier) and not self.student:
            raise ValueError("delta_ifd and verifier need student, the model of the rollouts")
        return self

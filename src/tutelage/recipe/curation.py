"""The tables of what makes and narrows down rows: data, curate, difficulty, magpie."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tutelage.recipe.base import (
    ConversationsRef,
    Mode,
    ModelRef,
    PositiveInt,
    Seed,
    Share,
    Step,
    Table,
)
from tutelage.recipe.filters import AnyFilter


class Columns(Table):
    """Which columns of a source hold what; an empty name means the source has none."""

    id: str = ""
    messages: str = ""
    system: str = ""
    prompt: str = ""
    response: str = ""
    thinking: str = ""
    answer: str = ""
    language: str = ""


class DataSource(Table):
    """Rows from one place."""

    source: str
    """`bundled:prompts`, `hub:owner/name`, `task:NAME` (one of ours: gridwalk, modchain, codeout;
    or reasoning-gym's), or a file path or glob (.jsonl, .json, .csv, .tsv, .parquet; all but the
    last also as .gz and .zst)."""
    columns: Columns = Columns()
    """Left out, the usual names are recognised (messages, conversations, prompt, question, ...)."""
    limit: Annotated[int, Field(ge=0)] = 0
    """At most so many rows, in the source's order; 0 takes all. Required for `task:`."""
    split: str = "train"
    subset: str = ""
    revision: str = ""
    language: str = ""
    task_config: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings. For every task: `reasoning = true` gives answers their chain,
    `prompts_only = true` leaves the answers out (a verifier still has the gold)."""
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Share of the result against other sources with a weight: rows are left out until the shares
    hold, never repeated. 0 takes all its rows."""


class Duplicates(Table):
    """Which rows say the same as an earlier one; earlier in the order of sources, then of rows."""

    of: Literal["prompt", "conversation"] = "prompt"
    """What is compared: the user's side, or all that is said."""
    near: Annotated[float, Field(ge=0, le=1)] = 0.64
    """Least Jaccard similarity of 3-word shingles; 0 drops exact copies only."""
    same_numbers: bool = False
    """Rows with other numbers are no duplicates: for problems made from templates."""


class Select(Table):
    """Which of the rows that are left are taken."""

    by: Literal["zip", "balance", "difficulty"]
    """zip: the most varied, by compression (arXiv 2407.06645). balance: groups as equal as can be.
    difficulty: near `centre`, by a Gaussian weight."""
    count: PositiveInt
    over: tuple[Literal["source", "language", "difficulty", "mode"], ...] = ("source", "language")
    """What makes a group, with `by = "balance"`."""
    centre: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Preferred difficulty: 0 is solved always, 1 never."""
    width: Annotated[float, Field(gt=0)] = 0.2


class Funnel(Step):
    """What narrows rows down, in this order: filters, decontaminate, duplicates, part, select."""

    produces: ClassVar[str] = "conversations"
    version: ClassVar[int] = 2
    filters: tuple[AnyFilter, ...] = ()
    """One after the other, as listed; what they drop is kept aside in `quarantine/`."""
    tokenizer: ModelRef = ""
    """The model whose tokens `length` counts."""
    decontaminate: tuple[DataSource, ...] = ()
    """Evaluation items: rows that share 13 words in a row with one are dropped."""
    duplicates: Duplicates | None = None
    """Left out, duplicates stay."""
    part: Literal["all", "train", "holdout"] = "all"
    """Which side of the split; it goes by the prompt's text, so equal prompts never straddle it."""
    holdout_share: Share = 0.1
    select: Select | None = None
    limit: Annotated[int, Field(ge=0)] = 0
    """Rows kept after the shuffle; 0 keeps all."""
    seed: Seed

    @model_validator(mode="after")
    def _a_tokenizer_for_lengths(self) -> "Funnel":
        if any(table.name == "length" for table in self.filters) and not self.tokenizer:
            raise ValueError("filter length counts tokens: name a model in tokenizer")
        return self


class Data(Funnel):
    """Conversations or prompts from files, the Hub, a task or the bundled prompt file."""

    stage: Literal["data"]
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    max_bad_share: Share = 0.01
    """More malformed rows than this stop the step; fewer are set aside in `quarantine/`."""


class Curate(Funnel):
    """The same for conversations that earlier steps made: synthesized, scored for difficulty."""

    stage: Literal["curate"]
    data: Annotated[tuple[ConversationsRef, ...], Field(min_length=1)]


class Difficulty(Step):
    """How hard each row is for a student, from 0 (always solved) to 1 (never)."""

    produces: ClassVar[str] = "conversations"
    version: ClassVar[int] = 2
    stage: Literal["difficulty"]
    model: ModelRef
    data: ConversationsRef
    by: Literal["pass-rate", "likelihood"] = "pass-rate"
    """pass-rate: 1 - share of `samples` answers that the verifier takes (arXiv 2505.22375), for
    rows with a gold answer. likelihood: rank of the row's answer by IFD (arXiv 2308.12032)."""
    verifier: str = "auto"
    """A grader: exact, numeric, math, choice, code, task, reasoning-gym; auto goes by the row."""
    mode: Mode = "fast"
    samples: PositiveInt = 4
    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(gt=0)] = 0.6
    """At 1 a small student solves next to nothing, and all rows look alike."""
    shard_rows: PositiveInt = 64
    batch_rows: PositiveInt = 32
    seed: Seed


class Magpie(Step):
    """Prompts by the teacher: given only the opening of a user's turn, it writes one (2406.08464).

    Filter them like any other prompts, in a `curate` step.
    """

    produces: ClassVar[str] = "conversations"
    engine_roles: ClassVar[tuple[str, ...]] = ("teacher",)
    stage: Literal["magpie"]
    teacher: ModelRef
    count: PositiveInt
    """Prompts asked for; empty ones and those cut off are left out."""
    system: str = ""
    """A system message before the turn, to steer what is asked about."""
    language: str = ""
    """What the rows say their language is."""
    max_tokens: PositiveInt = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    shard_rows: PositiveInt = 64
    batch_rows: PositiveInt = 32
    seed: Seed

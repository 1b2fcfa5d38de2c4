"""The tables of evaluation: `evaluate`, standard tasks, and the `ablation` page over many runs."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tutelage.recipe.base import (
    ConversationsRef,
    Mode,
    ModelRef,
    PositiveInt,
    ScoresRef,
    Seed,
    Share,
    Step,
    Table,
)


class Task(Table):
    """A standard task by its name in lm-evaluation-harness, from the Hub or from local files."""

    name: str
    """gsm8k, math500, mgsm_en, humaneval, mbpp, mmlu, cmmlu_SUBJECT, ceval, ifeval, drop, ..."""
    source: str = ""
    """A local file or glob (.jsonl, .csv, .tsv, .parquet) with the task's rows; empty: the Hub."""
    shots_source: str = ""
    """Rows to draw examples from, where `shots` is not 0 and they are not in `source`."""
    limit: Annotated[int, Field(ge=0)] = 0
    """The first so many items; 0 takes all."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Solved examples before each item."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """Longest answer; 0 takes the step's."""


class Evaluate(Step):
    """Models on held-out prompts, every figure with an interval.

    `teacher` and `prompts`: distance to the teacher, token by token. `tests`: data steps with gold
    answers, graded. `tasks`: the standard benchmarks.
    """

    produces: ClassVar[str] = "scores"
    version: ClassVar[int] = 2
    stage: Literal["evaluate"]
    models: Annotated[tuple[ModelRef, ...], Field(min_length=1)]
    teacher: ModelRef = ""
    prompts: ConversationsRef = ""
    tests: tuple[ConversationsRef, ...] = ()
    tasks: tuple[Task, ...] = ()
    mode: Mode = "fast"
    system: str = ""
    """System prompt of tasks; the paper's evaluation has none."""
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.0,)
    """At which `tests` are answered; 0 is greedy."""
    samples: PositiveInt = 1
    """Answers a test item at temperatures above 0."""
    pass_at: tuple[PositiveInt, ...] = ()
    """pass@k for these k, unbiased (arXiv 2107.03374); needs samples >= k."""
    grader: str = "auto"
    """For `tests`: exact, numeric, math, choice, code, task, reasoning-gym; auto: by the row."""
    max_tokens: PositiveInt = 256
    max_truncated_share: Share = 0.2
    """More answers cut off than this, and a warning says that the score is one of length."""
    batch_rows: PositiveInt = 32
    bootstrap: PositiveInt = 2000
    """Resamples of the held-out prompts behind an interval."""
    seed: Seed

    @model_validator(mode="before")
    @classmethod
    def _a_task_by_its_name_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("tasks"), list | tuple):
            return value
        tasks = [{"name": task} if isinstance(task, str) else task for task in value["tasks"]]
        return {**value, "tasks": tasks}

    @model_validator(mode="after")
    def _something_to_measure(self) -> "Evaluate":
        if bool(self.teacher) != bool(self.prompts):
            raise ValueError("teacher and prompts go together: the distance to one on the other")
        if not (self.prompts or self.tests or self.tasks):
            raise ValueError("give prompts with a teacher, tests, or tasks")
        names = [task.name for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the task {twice[0]} stands there twice: take another step for it")
        most = self.samples if any(self.temperatures) else 1
        if wrong := [k for k in self.pass_at if k > most]:
            raise ValueError(f"pass@{wrong[0]} needs as many samples at a temperature above 0")
        return self


class Arm(Table):
    """One row of an ablation's table."""

    label: str
    """What a reader calls it."""
    group: str = ""
    """Arms of one group were given the same budget and stand together."""
    start: str = ""
    """The step it was trained on from: its costs count from there."""


class Claim(Table):
    """One sentence that the run can hold, contradict, or leave open; written before the run."""

    text: str
    better: str
    """The arm that should be better, and the one it should beat."""
    than: str
    source: str = ""
    """Who says it: an arXiv number, or where it was seen."""
    test: str = ""
    """The test step; empty: the only one."""
    mode: Mode = "fast"
    measure: Literal["accuracy", "tokens"] = "accuracy"
    """tokens: the better arm answers with fewer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    share_of: str = ""
    """An arm: also told is (better - than) / (this arm - than), the share of its gain."""
    expect: Literal["better", "equal", "open"] = "better"
    """equal: no difference is expected (a control); open: nothing was expected."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """With `expect = "equal"`: how far apart two arms may be and still be called equal."""


class Ablation(Step):
    """One page over all cells of the matrix: arms with intervals, costs, a verdict for each claim.

    It reads the evaluate steps of every cell; the cells are the repetitions (seeds).
    """

    produces: ClassVar[str] = "report"
    stage: Literal["ablation"]
    scores: Annotated[tuple[ScoresRef, ...], Field(min_length=1)]
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    """By step name, in the order of the table."""
    claims: tuple[Claim, ...] = ()
    title: str = "ablation"
    description: str = ""
    """What was asked and how it is analysed, as written before the run."""
    bootstrap: PositiveInt = 4000
    seed: Seed = 0

    @model_validator(mode="after")
    def _claims_are_about_arms(self) -> "Ablation":
        for claim in self.claims:
            for name in (claim.better, claim.than, claim.share_of):
                if name and name not in self.arms:
                    raise ValueError(f"a claim is about {name!r}, which is no arm")
        return self

"""The tables of a recipe, as frozen typed settings; how one is read stands in `load.py`.

The `[steps.*]` tables are the pipeline's graph: a field typed `ModelRef`, `ConversationsRef` and so
on names the step (or the model) it reads. No torch here: `tutelage plan` answers in under a second.
What makes and narrows down rows is in `curation.py`.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from tutelage.recipe.base import (
    AnyRef,
    ConversationsRef,
    Mode,
    ModelRef,
    PositiveInt,
    Reads,
    RolloutsRef,
    Seed,
    Step,
    Table,
)
from tutelage.recipe.curation import Curate, Data, Difficulty, Magpie
from tutelage.recipe.engines import AnyEngine, EngineTable, TopEngine
from tutelage.recipe.evaluation import Ablation, Evaluate
from tutelage.recipe.screening import Screen
from tutelage.recipe.training import Distill, Online, Sft

SERVED = "served:"
ESTIMATOR_SETTINGS = {"threshold": ("tau", "budget", "budget_unit"), "fixed": ("head", "draws")}


class Fleet(Table):
    """The cluster of `executor = "ray"`; its nodes see the store and the models under one path."""

    address: Annotated[str, Field(pattern=r"^(local|auto|[^\s/]+:\d+)$")] = "local"
    """`local` starts Ray on this machine; `auto` joins the cluster that runs here; or HOST:PORT of
    its head."""
    actors: Annotated[int, Field(ge=0)] = 0
    """Engines at a time; 0: as many as the cluster has room for, also where room comes later."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """Of one actor."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """Of one actor; a share lets several have one GPU."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Further resources of one actor, such as `{ NPU = 1 }`."""


class Runtime(Table):
    """Where and how fast; never part of an artifact's identity."""

    jobs: PositiveInt = 1
    """Steps made at a time, each in a process of its own with `threads` threads (0: its share)."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes that make each `sft` and `distill` step together, on this machine; 0 and 1: one.
    The result is that of one up to rounding, so it is the same step."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes: each has the whole model, or a shard of every layer (FSDP2)."""
    sandbox: Literal["bubblewrap", "none"] = "bubblewrap"
    """Where generated programs run. `none` runs them as you, on this machine: `run` then wants
    `--allow-unsandboxed` too."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read and filter rows; 0 takes one a core."""
    device: Literal["auto", "cpu", "cuda", "npu", "mps"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of a process; 0 takes what the machine offers."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Programs that show the figures of a training while it runs, beside `metrics.jsonl`."""
    executor: Literal["local", "ray"] = "local"
    """Where shards of `rollout`, `screen`, `score`, `synthesize` and `magpie` are made: in this
    process, or by actors of a Ray cluster with an engine each. The results are the same."""
    ray: Fleet = Field(default_factory=lambda: Fleet())

    @model_validator(mode="after")
    def _one_way_to_part(self) -> "Runtime":
        if self.jobs > 1 and self.processes > 1:
            raise ValueError(
                "jobs makes several steps at a time, processes one step by several: set one of them"
            )
        return self


class NewModel(Table):
    """A model with random weights and a tokenizer of its own, for a lab. Llama's architecture."""

    layers: PositiveInt = 2
    hidden_size: PositiveInt = 64
    heads: PositiveInt = 2
    kv_heads: Annotated[int, Field(ge=0)] = 0
    """Key and value heads; 0: as many as heads."""
    intermediate_size: Annotated[int, Field(ge=0)] = 0
    """Width of the feed-forward layers; 0: 8/3 of hidden_size, up to a multiple of 8."""
    max_positions: PositiveInt = 1024
    tie_embeddings: bool = True
    tokenizer: Literal["characters", "words", "bpe"] = "bpe"
    """What is trained on `data`: every character it holds, every word and sign, or byte pairs."""
    vocab_size: PositiveInt = 512
    """Most entries, special ones included."""
    data: tuple[ConversationsRef, ...] = ()
    """Text for the tokenizer; models that shall share ids name the same data and settings."""
    tokenizer_of: ModelRef = ""
    """Instead of training one: the tokenizer of this model."""
    seed: Seed

    @model_validator(mode="after")
    def _one_tokenizer(self) -> "NewModel":
        if bool(self.data) == bool(self.tokenizer_of):
            raise ValueError("give data to train a tokenizer on, or tokenizer_of, a model's")
        if self.hidden_size % self.heads or self.heads % (self.kv_heads or self.heads):
            raise ValueError("hidden_size must be a multiple of heads, and heads of kv_heads")
        if (self.hidden_size // self.heads) % 2:
            raise ValueError("hidden_size / heads must be even, for rotary positions")
        return self


class ModelSource(Table):
    """A model from outside: where it is, and how it is cut before training."""

    source: str
    """`bundled:NAME`, a Hub id `owner/name`, a directory, a `.gguf` file, `new`, or `served:NAME`:
    one that lives behind a server only, whose weights never come here (`[engines.*]`)."""
    new: NewModel | None = None
    """With `source = "new"`: what the model is like."""
    revision: str = ""
    """Branch, tag or commit on the Hub; a commit makes the recipe repeatable."""
    tokenizer: str = ""
    """With `served:NAME`: where its tokenizer and config are, as a source."""
    drop_layers: Annotated[int, Field(ge=0)] = 0
    """Remove this many layers of least block influence (arXiv 2403.03853)."""
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Or keep exactly these layers, counted from 0."""
    adapter: str = ""
    """A directory with a LoRA in PEFT's layout, merged in before anything else."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_cut_and_a_pinned_code(self) -> "ModelSource":
        if (self.source == "new") != (self.new is not None):
            raise ValueError('source = "new" and the table new go together')
        if self.is_served != bool(self.tokenizer):
            raise ValueError('source = "served:NAME" and tokenizer go together')
        if self.is_served and self.is_pruned:
            raise ValueError("a served model is not pruned: its weights are elsewhere")
        if self.adapter and (self.is_served or self.new or self.is_pruned):
            raise ValueError("an adapter is merged into a whole model from outside, and only that")
        if self.new and self.is_pruned:
            raise ValueError("a new model is not pruned: give it fewer layers")
        if self.drop_layers and self.keep_layers:
            raise ValueError("drop_layers and keep_layers exclude each other: give one")
        if self.trust_remote_code and not self.revision:
            raise ValueError("trust_remote_code = true needs a pinned revision")
        return self

    @property
    def is_served(self) -> bool:
        """Whether its weights are behind a server, and never here."""
        return self.source.startswith(SERVED)

    @property
    def is_pruned(self) -> bool:
        """Whether layers are removed."""
        return bool(self.drop_layers or self.keep_layers)


class New(NewModel, Step):
    """Such a model as a step. Made from `[models.*]` with `source = "new"`; rarely by hand."""

    produces: ClassVar[str] = "model"
    stage: Literal["new"]


class Prune(Step):
    """A depth-pruned start. Made from `[models.*]` with `drop_layers`; rarely written by hand."""

    produces: ClassVar[str] = "model"
    stage: Literal["prune"]
    model: ModelRef
    drop_layers: Annotated[int, Field(ge=0)] = 0
    keep_layers: tuple[int, ...] = ()
    calibration_rows: PositiveInt = 24
    """Bundled prompts on which block influence is measured."""


class Merge(Step):
    """An adapter merged into its base. Made from `[models.*]` with `adapter`; rarely by hand."""

    produces: ClassVar[str] = "model"
    stage: Literal["merge"]
    model: ModelRef
    adapter: str


class Sampling(Step):
    """Settings shared by the stages that generate text."""

    prompts: ConversationsRef
    mode: Mode
    max_tokens: PositiveInt = 512
    temperature: Annotated[float, Field(ge=0)] = 1.0
    samples: PositiveInt = 1
    """Answers a prompt."""
    shard_rows: PositiveInt = 64
    """Answers a shard; a crash costs at most one shard."""
    batch_rows: PositiveInt = 32
    seed: Seed


class Synthesize(Sampling):
    """The teacher answers prompts, in reasoning or in fast mode (stages 1 and 2 of the paper)."""

    produces: ClassVar[str] = "conversations"
    version: ClassVar[int] = 3
    engine_roles: ClassVar[tuple[str, ...]] = ("teacher", "judge")
    stage: Literal["synthesize"]
    teacher: ModelRef
    max_think_tokens: PositiveInt = 512
    """Budget of the chain in reasoning mode; past it the chain is closed and the answer begins."""
    elicit: str = ""
    """Added to the prompt in reasoning mode, for the teacher alone: `Think step by step.` helps
    one that has no thinking mode of its own."""
    keep_truncated: bool = True
    """Keep answers cut off at `max_tokens`, without teaching their end."""
    verifier: str = ""
    """A grader (exact, numeric, math, choice, code, task, reasoning-gym, or auto: by the row) that
    the answer must pass; empty takes answers as they come. Rows without a gold answer (tests, for
    code) pass unjudged."""
    keep: Literal["all", "shortest"] = "all"
    """Of a prompt's answers that passed: all, or the one of fewest tokens (arXiv 2505.22375)."""
    judge: ModelRef = ""
    """A model that gives a second opinion: answers it rates under `judge_least` are put aside."""
    rubric: str = "The answer is correct, complete, clear, and does what was asked."
    judge_least: Annotated[int, Field(ge=1, le=5)] = 3


class Rollout(Sampling):
    """The student answers the prompts once (arXiv 2509.26497, offline on-policy)."""

    produces: ClassVar[str] = "rollouts"
    version: ClassVar[int] = 2
    engine_roles: ClassVar[tuple[str, ...]] = ("model",)
    stage: Literal["rollout"]
    model: ModelRef


class Route(Table):
    """Rollouts that another teacher reads."""

    teacher: ModelRef
    by: Literal["source", "task", "language", "mode"] = "source"
    """The column of the rollouts that decides."""
    values: Annotated[tuple[str, ...], Field(min_length=1)]


class Score(Step):
    """The teacher reads the rollouts once, prefill only, and its targets are stored."""

    produces: ClassVar[str] = "targets"
    version: ClassVar[int] = 3
    engine_roles: ClassVar[tuple[str, ...]] = ("teacher", "routes")
    stage: Literal["score"]
    teacher: ModelRef
    """Who reads what no route takes."""
    routes: tuple[Route, ...] = ()
    """Further teachers; the first route that fits a rollout takes it."""
    rollouts: RolloutsRef
    hints: ConversationsRef = ""
    """Rows of the same prompts that hold what the teacher may know and the student did not: gold
    answers, or the chains of a `synthesize` step. Targets stay those of the student's own prompt
    and tokens (self-distillation with privileged context)."""
    hint: str = ""
    """Added to the last message that the teacher sees, with `{answer}` for the gold answer and
    `{response}` for the answer in `hints`. A row that lacks it is read without, and counted."""
    hint_chain: bool = False
    """The teacher reads a fast answer behind the chain in `hints`, as if it had thought first."""
    estimator: Literal["threshold", "fixed"] = "threshold"
    """threshold is unbiased and smallest; fixed keeps `head` ids and `draws` from the rest: `head =
    0` is pure sampling (arXiv 2503.16870), `draws = 0` a plain top-k, which is biased."""
    tau: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Threshold of the sparse target: probabilities from tau up are exact, the rest is sampled."""
    budget: Annotated[float, Field(ge=0)] = 0.0
    """Instead of tau: so much a token, from which tau is found on a sample; 0 sets none."""
    budget_unit: Literal["ids", "bytes"] = "bytes"
    """bytes counts what the teacher says; text and student add about 3 a token."""
    head: Annotated[int, Field(ge=0)] = 12
    draws: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    shard_rows: PositiveInt = 256
    logit_chunk_mb: PositiveInt = 128
    """Memory of the one chunk of logits that is alive at a time."""
    seed: Seed

    @model_validator(mode="after")
    def _settings_of_its_estimator(self) -> "Score":
        given = self.model_fields_set
        if "tau" in given and self.budget:
            raise ValueError("tau and budget exclude each other: the budget finds tau; give one")
        for estimator, names in ESTIMATOR_SETTINGS.items():
            if self.estimator != estimator and (wrong := [n for n in names if n in given]):
                raise ValueError(f"{wrong[0]} is a setting of estimator = {estimator!r}")
        if self.estimator == "fixed" and self.head + self.draws == 0:
            raise ValueError("head = 0 and draws = 0 store nothing of the teacher")
        return self

    @model_validator(mode="after")
    def _hints_and_where_they_are(self) -> "Score":
        if bool(self.hints) != bool(self.hint or self.hint_chain):
            raise ValueError("hints names the rows, and hint or hint_chain says what of them")
        if self.hint and not any(name in self.hint for name in ("{answer}", "{response}")):
            raise ValueError("hint holds neither {answer} nor {response}: nothing of the row")
        return self

    def top(self, engines: Iterable[EngineTable]) -> int | None:
        """How many of the likeliest ids its engines can give; None where they give any target.

        Raises ValueError for a target that they cannot give.
        """
        limited = [engine for engine in engines if isinstance(engine, TopEngine)]
        if not limited:
            return None
        least = min(limited, key=lambda engine: engine.top)
        if not all(engine.scores for engine in limited):
            raise ValueError("the engine only answers, it cannot read; take vllm's or sglang's")
        if self.budget or (self.estimator == "fixed" and (self.draws or self.head > least.top)):
            what = "a budget" if self.budget else f"head = {self.head} and draws = {self.draws}"
            raise ValueError(
                f"{what} asks for more than the {least.top} likeliest ids that the engine "
                f"{least.kind} gives; take estimator = 'fixed', draws = 0 and head up to its top"
            )
        if self.temperature != 1:
            raise ValueError(
                f"temperature = {self.temperature} needs whole distributions, and the engine "
                f"{least.kind} gives {least.top} ids; set temperature = 1"
            )
        return self.head if self.estimator == "fixed" else least.top


class Convert(Step):
    """Teacher targets captured with DistillKit, as targets of our store: no score step is run."""

    produces: ClassVar[str] = "targets"
    stage: Literal["convert"]
    source: str
    """Its Parquet files, a path or glob; `compression_config.yaml` is looked for beside them."""
    model: ModelRef
    """Whose tokenizer the ids are of."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """`logprob_compressor` of the capture, where there is no compression_config.yaml."""
    shard_rows: PositiveInt = 64


class Export(Step):
    """Files for the edge, run in their own runtime before they are called done."""

    produces: ClassVar[str] = "export"
    stage: Literal["export"]
    model: ModelRef
    prompts: ConversationsRef
    formats: Annotated[tuple[Literal["f16", "bf16", "q8_0", "q4_0"], ...], Field(min_length=1)] = (
        "f16",
        "q8_0",
    )
    questions: PositiveInt = 3
    """Held-out prompts whose first answers are shown."""
    max_tokens: PositiveInt = 64
    max_kl: Annotated[float, Field(ge=0)] = 0.0
    """Fail when a file is further than this from the model, in nats a token; 0 sets no gate."""


class Report(Step):
    """One self-contained HTML page over the steps it names and all they came from."""

    produces: ClassVar[str] = "report"
    version: ClassVar[int] = 2
    stage: Literal["report"]
    steps: Annotated[tuple[AnyRef, ...], Field(min_length=1)]
    title: str = "report"


AnyStep = Annotated[
    Prune
    | Data
    | Curate
    | Difficulty
    | Magpie
    | Synthesize
    | New
    | Merge
    | Sft
    | Rollout
    | Screen
    | Score
    | Convert
    | Distill
    | Online
    | Evaluate
    | Export
    | Report
    | Ablation,
    Field(discriminator="stage"),
]
STEP_TYPES: dict[str, type[Step]] = {
    get_args(kind.model_fields["stage"].annotation)[0]: kind
    for kind in get_args(get_args(AnyStep)[0])
}


class Recipe(Table):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    seed: Seed = 0
    runtime: Runtime = Runtime()
    models: dict[str, ModelSource]
    engines: dict[str, AnyEngine] = Field(default_factory=dict)
    """By the name of the model or step that is run; one that is not named runs in this process."""
    steps: dict[str, AnyStep]


def references(step: Table) -> Iterator[tuple[str, str, str]]:
    """Every input of a step as (role, kind, name).

    Roles of a list are `models.0`, `models.1`; those of a list of tables `routes.0.teacher`.
    """
    for field, info in type(step).model_fields.items():
        value = getattr(step, field)
        if kind := next((m.kind for m in info.metadata if isinstance(m, Reads)), None):
            if value:
                yield field, kind, value
        elif kind := _kind_of_items(info.annotation):
            for index, name in enumerate(value):
                yield f"{field}.{index}", kind, name
        elif isinstance(value, tuple):
            for index, table in enumerate(value):
                if isinstance(table, Table):
                    for role, below, name in references(table):
                        yield f"{field}.{index}.{role}", below, name


def settings(step: Table) -> dict[str, Any]:
    """A step's settings without its stage and inputs: what enters its identity."""
    found = step.model_dump(mode="json", exclude={"stage"})
    for field, info in type(step).model_fields.items():
        value = getattr(step, field)
        read = any(isinstance(mark, Reads) for mark in info.metadata)
        if read or _kind_of_items(info.annotation):
            del found[field]
        elif isinstance(value, tuple) and any(isinstance(table, Table) for table in value):
            found[field] = [settings(table) for table in value]
    return found


def _kind_of_items(annotation: Any) -> str | None:
    for item in get_args(annotation):
        for mark in getattr(item, "__metadata__", ()):
            if isinstance(mark, Reads):
                return mark.kind
    return None

"""The tables of a recipe, as frozen typed settings; how one is read stands in `load.py`.

The `[steps.*]` tables are the pipeline's graph: a field typed `ModelRef`, `ConversationsRef` and so
on names the step (or the model) it reads. No torch here: `tutelage plan` answers in under a second.
What makes and narrows down rows is in `curation.py`.
"""

from collections.abc import Iterator
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
    Share,
    Step,
    Table,
    TargetsRef,
)
from tutelage.recipe.curation import Curate, Data, Difficulty, Magpie

ESTIMATOR_SETTINGS = {"threshold": ("tau", "budget", "budget_unit"), "fixed": ("head", "draws")}


class Runtime(Table):
    """Where and how fast; never part of an artifact's identity."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read and filter rows; 0 takes one a core."""
    device: Literal["auto", "cpu", "cuda", "npu", "mps"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of a process; 0 takes what the machine offers."""


class ModelSource(Table):
    """A model from outside: where it is, and how it is cut before training."""

    source: str
    """`bundled:NAME`, a Hub id `owner/name`, a directory, or a `.gguf` file."""
    revision: str = ""
    """Branch, tag or commit on the Hub; a commit makes the recipe repeatable."""
    drop_layers: Annotated[int, Field(ge=0)] = 0
    """Remove this many layers of least block influence (arXiv 2403.03853)."""
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Or keep exactly these layers, counted from 0."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_cut_and_a_pinned_code(self) -> "ModelSource":
        if self.drop_layers and self.keep_layers:
            raise ValueError("drop_layers and keep_layers exclude each other: give one")
        if self.trust_remote_code and not self.revision:
            raise ValueError("trust_remote_code = true needs a pinned revision")
        return self

    @property
    def is_pruned(self) -> bool:
        """Whether layers are removed."""
        return bool(self.drop_layers or self.keep_layers)


class Prune(Step):
    """A depth-pruned start. Made from `[models.*]` with `drop_layers`; rarely written by hand."""

    produces: ClassVar[str] = "model"
    stage: Literal["prune"]
    model: ModelRef
    drop_layers: Annotated[int, Field(ge=0)] = 0
    keep_layers: tuple[int, ...] = ()
    calibration_rows: PositiveInt = 24
    """Bundled prompts on which block influence is measured."""


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
    version: ClassVar[int] = 2
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
    """A grader (exact, numeric, math, choice, reasoning-gym, or auto: by the row) that the answer
    must pass; empty takes answers as they come. Rows without a gold answer pass unjudged."""
    keep: Literal["all", "shortest"] = "all"
    """Of a prompt's answers that passed: all, or the one of fewest tokens (arXiv 2505.22375)."""
    judge: ModelRef = ""
    """A model that gives a second opinion: answers it rates under `judge_least` are put aside."""
    rubric: str = "The answer is correct, complete, clear, and does what was asked."
    judge_least: Annotated[int, Field(ge=1, le=5)] = 3


class Rollout(Sampling):
    """The student answers the prompts once (arXiv 2509.26497, offline on-policy)."""

    produces: ClassVar[str] = "rollouts"
    stage: Literal["rollout"]
    model: ModelRef


class Score(Step):
    """The teacher reads the rollouts once, prefill only, and its targets are stored."""

    produces: ClassVar[str] = "targets"
    version: ClassVar[int] = 2
    stage: Literal["score"]
    teacher: ModelRef
    rollouts: RolloutsRef
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


class Training(Step):
    """Settings of the one training loop, shared by `sft` and `distill`."""

    produces: ClassVar[str] = "model"
    model: ModelRef
    lr: Annotated[float, Field(gt=0)] = 1e-5
    min_lr_share: Share = 0.1
    """Cosine schedule down to this share of `lr`."""
    warmup_share: Share = 0.05
    epochs: PositiveInt = 1
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Stop after so many optimizer steps; 0 runs all epochs."""
    batch_tokens: PositiveInt = 4096
    """Tokens of an optimizer step, prompts included."""
    pack_tokens: PositiveInt = 2048
    """Length of a packed row; longer examples are cut at their end."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    """Save a checkpoint this often; 0 after every step."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: Seed


class CurriculumStage(Table):
    """A part of an `sft` step's training with one mixture of modes, one rate and one order."""

    mix: dict[Mode, Annotated[float, Field(ge=0)]]
    """Weight of each mode: `{ reasoning = 3, fast = 1 }` is three to one, in examples."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Of the step's examples; the shares of all stages sum to 1."""
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of this stage's examples that follow the mixtures of the stages before it."""
    ramp: Share = 0.0
    """Share of this stage over which its mixture grows from the last one's; 0 switches at once."""
    order: Literal["random", "easy-first"] = "random"
    """easy-first needs rows with a difficulty."""
    pacing: Literal["linear", "root", "step"] = "root"
    """How harder rows are let in (arXiv 1904.03626)."""
    start: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The easiest share of the rows, open from the beginning."""

    @model_validator(mode="after")
    def _a_mode_to_learn(self) -> "CurriculumStage":
        if not sum(self.mix.values()):
            raise ValueError("mix gives no mode a weight")
        return self


class Sft(Training):
    """Supervised fine-tuning on conversations; several data steps are mixed."""

    stage: Literal["sft"]
    data: Annotated[tuple[ConversationsRef, ...], Field(min_length=1)]
    mixture: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """One weight per data step, as shares of the rows seen: an epoch sees every row of the first
    step once and as many of the others as their weights ask for. Left out: every row once."""
    curriculum: tuple[CurriculumStage, ...] = ()
    """Stages by mode over all rows together, instead of a mixture of data steps; an epoch is as
    many examples as there are rows."""

    @model_validator(mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("data"), str):
            return {**value, "data": [value["data"]]}
        return value

    @model_validator(mode="after")
    def _one_way_to_mix(self) -> "Sft":
        if self.mixture and self.curriculum:
            raise ValueError("mixture and curriculum exclude each other: give one")
        if self.curriculum and abs(sum(stage.share for stage in self.curriculum) - 1) > 1e-6:
            raise ValueError("the shares of the curriculum's stages do not sum to 1")
        for field in ("replay", "ramp") if self.curriculum else ():
            if getattr(self.curriculum[0], field):
                raise ValueError(f"the first stage has none before it to {field} from")
        return self

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> "Sft":
        if self.mixture and len(self.mixture) != len(self.data):
            raise ValueError(
                f"mixture has {len(self.mixture)} weights for {len(self.data)} data steps"
            )
        return self


class Distill(Training):
    """Training on stored teacher targets: `(1 - lam) * CE + lam * KD` (arXiv 2509.26497)."""

    version: ClassVar[int] = 2
    stage: Literal["distill"]
    targets: TargetsRef
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew", "policy_gradient"] = "forward_kl"
    outside: Literal["auto", "unbiased", "bucket", "truncated", "renormalised"] = "auto"
    """Treatment of ids outside the head; auto is unbiased for forward_kl, bucket otherwise."""
    reverse_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a bucketed reverse KL mixed in; 0.25 helps small students when sampling."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The teacher's weight in `jsd`."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The teacher's weight in the mixture of `skew`."""
    lam: Share = 0.9
    ce_on: Literal["rollout", "teacher", "none"] = "rollout"
    """Which label the cross-entropy learns: the student's own sampled token, the next token of
    `text`, or none (then lam = 1)."""
    text: ConversationsRef = ""
    """With `ce_on = "teacher"`: the teacher's own answers, one seen with every rollout."""
    first_tokens: Annotated[int, Field(ge=0)] = 0
    """Train only on so many first tokens of an answer; 0 takes all (arXiv 2606.22600)."""
    first_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Train only on this first share of an answer."""

    @model_validator(mode="after")
    def _text_for_its_label(self) -> "Distill":
        if (self.ce_on == "teacher") != bool(self.text):
            raise ValueError(
                'ce_on = "teacher" and text go together: text names the step with its answers'
            )
        return self


class Evaluate(Step):
    """Models against their teacher on held-out prompts, every figure with an interval."""

    produces: ClassVar[str] = "scores"
    stage: Literal["evaluate"]
    models: Annotated[tuple[ModelRef, ...], Field(min_length=1)]
    teacher: ModelRef
    prompts: ConversationsRef
    mode: Mode = "fast"
    max_tokens: PositiveInt = 256
    batch_rows: PositiveInt = 32
    bootstrap: PositiveInt = 2000
    """Resamples of the held-out prompts behind an interval."""
    seed: Seed


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
    | Sft
    | Rollout
    | Score
    | Convert
    | Distill
    | Evaluate
    | Export
    | Report,
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
    steps: dict[str, AnyStep]


def references(step: Step) -> Iterator[tuple[str, str, str]]:
    """Every input of a step as (role, kind, name); roles of a list are `models.0`, `models.1`."""
    for field, info in type(step).model_fields.items():
        if kind := next((m.kind for m in info.metadata if isinstance(m, Reads)), None):
            if getattr(step, field):
                yield field, kind, getattr(step, field)
        elif kind := _kind_of_items(info.annotation):
            for index, name in enumerate(getattr(step, field)):
                yield f"{field}.{index}", kind, name


def settings(step: Step) -> dict[str, Any]:
    """A step's settings without its stage and inputs: what enters its identity."""
    inputs = {
        field
        for field, info in type(step).model_fields.items()
        if any(isinstance(mark, Reads) for mark in info.metadata) or _kind_of_items(info.annotation)
    }
    return step.model_dump(mode="json", exclude={"stage", *inputs})


def _kind_of_items(annotation: Any) -> str | None:
    for item in get_args(annotation):
        for mark in getattr(item, "__metadata__", ()):
            if isinstance(mark, Reads):
                return mark.kind
    return None

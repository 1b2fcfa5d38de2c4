"""The tables of training: `sft`, `distill`, `online`, and what they share."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

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
    TargetsRef,
)


class Lora(Table):
    """Low-rank adapters that are trained in place of the weights (arXiv 2106.09685).

    The embedding and the output layer stay frozen. Every step has adapters of its own, over the
    weights it is given; the result is a whole model again.
    """

    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """An adapter's part is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are zeroed in training."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Which linear layers, by the last part of their names: `["q_proj", "v_proj"]`."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen layers in 4 or 8 bits while training (QLoRA, arXiv 2305.14314)."""

    @model_validator(mode="before")
    @classmethod
    def _one_target_is_a_list_of_one(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("targets"), str):
            targets = value["targets"]
            return {**value, "targets": targets if targets == "all-linear" else [targets]}
        return value


class Training(Step):
    """Settings of the one training loop, shared by `sft` and `distill`."""

    produces: ClassVar[str] = "model"
    model: ModelRef
    lr: Annotated[float, Field(gt=0)] = 1e-5
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: half a cosine down; or level, and down over the last `decay_share` of the
    steps (warm-up, stable, decay: arXiv 2404.06395); or level."""
    min_lr_share: Share = 0.1
    """Down to this share of `lr`."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Of all steps, for `wsd`."""
    warmup_share: Share = 0.05
    epochs: PositiveInt = 1
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Stop after so many optimizer steps; 0 runs all epochs."""
    batch_tokens: PositiveInt = 4096
    """Tokens of an optimizer step, prompts included."""
    batch_examples: Annotated[int, Field(ge=0)] = 0
    """Instead: so many examples a step, which makes two runs equal in sequences as in steps."""
    pack_tokens: PositiveInt = 2048
    """Length of a packed row; longer examples are cut at their end."""
    rows_together: PositiveInt = 1
    """Packed rows in one forward pass, padded to the longest: many short rows for a tiny model,
    whose step is all overhead, one long row for a large one."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    """Save a checkpoint this often; 0 after every step."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Save the exponential moving average of the weights, of this decay a step (0.999); 0: off."""
    average_last: Annotated[int, Field(ge=0)] = 0
    """Save the mean of the last so many snapshots of the weights (merging as in arXiv 2505.22375);
    0: off."""
    average_every: PositiveInt = 1
    """Optimizer steps from one snapshot to the next; the last is the end."""
    evaluations: PositiveInt = 10
    """Times the held-out rows are looked at, evenly over the step, where it names any."""
    keep: Literal["last", "best"] = "last"
    """Which weights are saved: the last, or those of the least held-out loss."""
    patience: Annotated[int, Field(ge=0)] = 0
    """End after so many looks in a row without a gain on the held-out rows; 0 never."""
    lora: Lora | None = None
    """Train adapters in the frozen model; left out: all weights."""
    schedule: tuple[Share, Share] = (0.0, 1.0)
    """Which part of one training this step is: [0.0, 0.5] and behind it [0.5, 1.0] have the rates
    and the order of rows of one step with twice the epochs (and max_steps), and the optimizer's
    moments go with the model from the first to the second."""
    seed: Seed

    @model_validator(mode="after")
    def _a_part(self) -> Self:
        if self.schedule[0] >= self.schedule[1]:
            raise ValueError("schedule is [from, to] with from below to, as [0.0, 0.5]")
        return self

    @model_validator(mode="after")
    def _a_decay_beside_the_warmup(self) -> Self:
        if self.lr_schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ValueError("warmup_share and decay_share sum to more than 1")
        if "decay_share" in self.model_fields_set and self.lr_schedule != "wsd":
            raise ValueError("decay_share is a setting of lr_schedule = 'wsd'")
        return self

    @model_validator(mode="after")
    def _one_set_of_weights_to_save(self) -> Self:
        if self.average_last and (self.ema or self.keep == "best" or self.patience):
            raise ValueError(
                "average_last counts from the planned end: it goes without ema, keep and patience"
            )
        if "average_every" in self.model_fields_set and not self.average_last:
            raise ValueError("average_every is the distance of average_last's snapshots: give both")
        if (self.keep == "best" or self.patience) and not self.holds_out:
            raise ValueError("keep = 'best' and patience need held-out rows: set held_out")
        return self

    @property
    def holds_out(self) -> bool:
        """Whether rows are named on which the training is looked at."""
        return False

    @property
    def part(self) -> float:
        """Share of the whole training that this step is."""
        return self.schedule[1] - self.schedule[0]

    @property
    def whole_epochs(self) -> int:
        """Epochs to plan for the whole training, of which this step runs its part."""
        # 2 / (1 - 2/3) is a hair above 6, which must not plan a seventh.
        return math.ceil(self.epochs / self.part * (1 - 1e-6))

    def steps_of_whole(self, planned: int) -> tuple[int, int, int]:
        """Of `planned` steps over `whole_epochs`: first and last (excluded) of ours, and of all."""
        whole = round(planned * self.epochs / self.part / self.whole_epochs)
        if self.max_steps:
            whole = min(whole, round(self.max_steps / self.part))
        first, last = (round(share * whole) for share in self.schedule)
        return first, last, whole


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

    version: ClassVar[int] = 2
    stage: Literal["sft"]
    data: Annotated[tuple[ConversationsRef, ...], Field(min_length=1)]
    mixture: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """One weight per data step, as shares of the rows seen: an epoch sees every row of the first
    step once and as many of the others as their weights ask for. Left out: every row once."""
    curriculum: tuple[CurriculumStage, ...] = ()
    """Stages by mode over all rows together, instead of a mixture of data steps; an epoch is as
    many examples as there are rows."""
    held_out: ConversationsRef = ""
    """A data step whose rows are not learnt from: their loss is looked at `evaluations` times."""

    @property
    def holds_out(self) -> bool:
        """See `Training`."""
        return bool(self.held_out)

    @model_validator(mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("data"), str):
            return {**value, "data": [value["data"]]}
        return value

    @model_validator(mode="after")
    def _one_way_to_part(self) -> "Sft":
        if self.curriculum and self.schedule != (0.0, 1.0):
            raise ValueError("curriculum has stages of its own: schedule must be [0.0, 1.0]")
        return self

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
    def _a_curriculum_to_its_end(self) -> "Sft":
        if self.curriculum and self.patience:
            raise ValueError("patience would end a curriculum before its later stages: give one")
        return self

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> "Sft":
        if self.mixture and len(self.mixture) != len(self.data):
            raise ValueError(
                f"mixture has {len(self.mixture)} weights for {len(self.data)} data steps"
            )
        return self


class TeacherLoss(Table):
    """The loss on a teacher's targets: `(1 - lam) * CE + lam * KD` (arXiv 2509.26497)."""

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


class Distill(TeacherLoss, Training):
    """Training on stored teacher targets: `(1 - lam) * CE + lam * KD` (arXiv 2509.26497)."""

    version: ClassVar[int] = 4
    stage: Literal["distill"]
    targets: TargetsRef
    text: ConversationsRef = ""
    """With `ce_on = "teacher"`: the teacher's own answers, one seen with every rollout."""
    first_tokens: Annotated[int, Field(ge=0)] = 0
    """Train only on so many first tokens of an answer; 0 takes all (arXiv 2606.22600)."""
    first_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Train only on this first share of an answer."""
    rounds: PositiveInt = 1
    """Answer and score anew so many times less one, with the student of the moment: the step
    becomes several under one schedule, which `plan` shows (arXiv 2605.05940 finds 2 best)."""
    gauge_rows: Annotated[int, Field(ge=0)] = 16
    """Rollouts kept out of training, at most 2 % of the store, on which the gauge of staleness
    reads the student in training: KL(student now || the one that answered). 0: no gauge."""
    gauge_points: PositiveInt = 10
    """Times it reads, evenly over the step; fewer where that would cost over 3 % of training."""
    max_staleness: Annotated[float, Field(gt=0)] = 0.1
    """Nats a token above which it warns (arXiv 2605.05940)."""
    stop_when_stale: bool = False
    """End the training there."""
    held_out: Annotated[int, Field(ge=0)] = 0
    """Rows of the store that are not learnt from: their loss is looked at `evaluations` times."""

    @property
    def holds_out(self) -> bool:
        """See `Training`."""
        return bool(self.held_out)

    @model_validator(mode="after")
    def _a_gauge_to_stop_by(self) -> "Distill":
        if self.stop_when_stale and not self.gauge_rows:
            raise ValueError("stop_when_stale needs the gauge: set gauge_rows")
        return self

    @model_validator(mode="after")
    def _text_for_its_label(self) -> "Distill":
        if (self.ce_on == "teacher") != bool(self.text):
            raise ValueError(
                'ce_on = "teacher" and text go together: text names the step with its answers'
            )
        return self


class Online(TeacherLoss, Training):
    """Distillation with fresh answers for every step: the yardstick of the offline way.

    The student of the moment answers, the teacher scores, one optimizer step follows. It pays for
    sampling in every step and repeats nothing from disk; `distill` is the product.
    """

    version: ClassVar[int] = 2
    stage: Literal["online"]
    teacher: ModelRef
    prompts: ConversationsRef
    mode: Mode
    max_tokens: PositiveInt = 512
    temperature: Annotated[float, Field(ge=0)] = 1.0
    prompts_a_step: PositiveInt = 16
    """Prompts answered for one optimizer step; `batch_tokens` and `batch_examples` play no part."""
    samples: PositiveInt = 1
    """Answers a prompt."""
    tau: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Threshold of the sparse target, as in `score`."""
    seed: Seed

    @model_validator(mode="after")
    def _no_text(self) -> "Online":
        if self.ce_on == "teacher":
            raise ValueError("ce_on is rollout or none here: there is no stored text")
        return self

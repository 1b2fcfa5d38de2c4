"""What every table of a recipe is made of: the frozen base, references to steps, common types."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Reads:
    """Marks a field as the name of a step that produces `kind`; an empty name reads nothing."""

    kind: str


ModelRef = Annotated[str, Reads("model")]
ConversationsRef = Annotated[str, Reads("conversations")]
RolloutsRef = Annotated[str, Reads("rollouts")]
TargetsRef = Annotated[str, Reads("targets")]
ScoresRef = Annotated[str, Reads("scores")]
AnyRef = Annotated[str, Reads("any")]
PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every generator takes; the random streams of numpy refuse a negative one."""
Mode = Literal["reasoning", "fast"]


class Table(BaseModel):
    """A table of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Step(Table):
    """What every step has: a stage, whose `version` rises when the same settings give new bytes."""

    produces: ClassVar[str]
    version: ClassVar[int] = 1
    engine_roles: ClassVar[tuple[str, ...]] = ()
    """Inputs whose model only answers or reads, so that any engine may run it."""
    stage: str

"""The tables `[engines.NAME]`: how the model or step of that name is run where it answers or reads.

Owns what each kind of engine can give, so that a plan can say it without opening one, and which of
its settings may change a result: those alone enter an identity, so that an address may.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tutelage.recipe.base import PositiveInt, Share, Table


class EngineTable(Table):
    """What every kind of engine has."""

    extra: ClassVar[str] = ""
    """The extra of this package that brings what it needs; empty: nothing more."""
    kind: str

    @property
    def scores(self) -> bool:
        """Whether it can read a text and say how likely each token was."""
        return True

    def meaning(self) -> dict[str, Any]:
        """What of it may change a result; empty for the default."""
        raise NotImplementedError


class TopEngine(EngineTable):
    """One that gives, of a distribution, the token's own log-probability and the likeliest ids."""

    top: PositiveInt = 20
    """Log-probabilities a token that it is asked for when it reads; vLLM's server gives no more
    than `--max-logprobs`, which is 20 where it was not raised."""


class Transformers(EngineTable):
    """Here, in this process, on any device: the default."""

    kind: Literal["transformers"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights in memory; auto: as they are stored."""

    def meaning(self) -> dict[str, Any]:
        """See `EngineTable.meaning`."""
        return {} if self.dtype == "auto" else {"kind": self.kind, "dtype": self.dtype}


class Vllm(TopEngine):
    """Here, by vLLM: for GPUs and NPUs. It gives the `top` likeliest ids and the token's own."""

    extra: ClassVar[str] = "vllm"
    kind: Literal["vllm"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel: PositiveInt = 1
    """Devices that hold one copy of the model together."""
    memory_share: Annotated[Share, Field(gt=0)] = 0.9
    """Of the device's memory."""
    max_length: Annotated[int, Field(ge=0)] = 0
    """Longest prompt and answer together; 0: as the model's own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `vllm.LLM`, by their own names."""

    def meaning(self) -> dict[str, Any]:
        """See `EngineTable.meaning`."""
        options = {"options": self.options} if self.options else {}
        return {"kind": self.kind, "top": self.top, "dtype": self.dtype, **options}


class Server(TopEngine):
    """A server elsewhere that speaks HTTP: vLLM's, SGLang's, or llama.cpp's (answers only)."""

    kind: Literal["server"]
    api: Literal["vllm", "sglang", "llama.cpp"] = "vllm"
    url: str
    """Where it listens, such as `http://host:8000`; a path behind it is kept."""
    model: str = ""
    """The name it serves the model under; empty: the only one it has."""
    key_env: str = ""
    """The environment variable that holds its API key; the key itself is never written down."""
    concurrency: PositiveInt = 16
    """Requests under way at a time."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Of one request."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Times a request is sent again when the server is away, busy, or gives nothing usable."""

    @property
    def scores(self) -> bool:
        """See `EngineTable.scores`."""
        return self.api != "llama.cpp"

    def meaning(self) -> dict[str, Any]:
        """See `EngineTable.meaning`."""
        return {"kind": self.kind, "api": self.api, "top": self.top}

    @model_validator(mode="after")
    def _an_address(self) -> "Server":
        if not self.url.startswith(("http://", "https://")):
            raise ValueError("url begins with http:// or https://")
        if "@" in self.url.partition("//")[2].partition("/")[0]:
            raise ValueError("url holds a password; put the key into a variable and name key_env")
        return self


AnyEngine = Annotated[Transformers | Vllm | Server, Field(discriminator="kind")]
ENGINE_TYPES: dict[str, type[EngineTable]] = {
    "transformers": Transformers, "vllm": Vllm, "server": Server,
}  # fmt: skip
HERE = Transformers()
"""How a model without a table is run."""

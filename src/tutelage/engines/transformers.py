"""The engine `transformers`: a model in this process, on any device. It gives any target."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tutelage.core.artifact import Artifact
from tutelage.engines.sampler import TransformersSampler
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.load import Loaded, load_for_inference
from tutelage.recipe.engines import Transformers


@dataclass(frozen=True)
class TransformersEngine:
    """See `base.Engine`."""

    loaded: Loaded
    name: str = "transformers"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.loaded.tokenizer

    @property
    def directory(self) -> Path:
        """Where its tokenizer's files are."""
        return self.loaded.directory

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.loaded.model.config.get_text_config().vocab_size

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together; None where nothing says."""
        return getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def dtype(self) -> str:
        """Of its weights."""
        return str(self.loaded.model.dtype).removeprefix("torch.")

    def sampler(self, *, batch_rows: int) -> TransformersSampler:
        """What answers."""
        return TransformersSampler(
            self.loaded.model, batch_size=batch_rows, device=str(self.loaded.device)
        )

    def scorer(self, *, chunk_bytes: int) -> TransformersScorer:
        """What reads."""
        return TransformersScorer(
            self.loaded.model, device=str(self.loaded.device), chunk_bytes=chunk_bytes
        )

    def close(self) -> None:
        """Nothing to let go of but memory, which goes with the object."""


def open_engine(artifact: Artifact, table: Transformers, *, device: str) -> TransformersEngine:
    """Load the artifact's model. Raises ModelError, EngineError."""
    return TransformersEngine(load_for_inference(artifact, device=device, dtype=table.dtype))

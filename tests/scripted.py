"""A model that says what a test tells it to, in place of a loaded one."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tutelage.core.artifact import Artifact
from tutelage.engines import transformers
from tutelage.engines.base import Completion

CUT = "..."
"""What ends a text that was cut off."""


class Scripted:
    """Stands for model and sampler of a stage; subclasses say what is sampled."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.loaded: list[str] = []

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, stage: ModuleType = transformers) -> None:
        """Be what the engine `transformers` (or a stage by itself) loads and samples from."""
        monkeypatch.setattr(stage, "load_for_inference", self.load)
        monkeypatch.setattr(stage, "TransformersSampler", lambda model, **options: model)

    def load(self, artifact: Artifact, *, device: str, dtype: str = "auto") -> Any:
        self.loaded.append(artifact.fingerprint)
        return SimpleNamespace(model=self, tokenizer=self.tokenizer, device=torch.device("cpu"))

    def completion(self, text: str) -> Completion:
        """The text as sampled: up to its end of turn, or up to CUT and no further."""
        ids = self.tokenizer.encode(text.removesuffix(CUT), add_special_tokens=False)
        if text.endswith(CUT):
            return Completion(tuple(ids), (0.0,) * len(ids), "length")
        ids.append(self.tokenizer.eos_token_id)
        return Completion(tuple(ids), (0.0,) * len(ids), "stop")


def outside(path: Any, fingerprint: str) -> Artifact:
    """A folder as an artifact that no step made."""
    return Artifact(path, {"stage": "external", "fingerprint": fingerprint, "identity": {}})

"""A finished experiment written by hand: models with few weights, graded answers of known truth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tutelage.core.artifact import Artifact, WorkDir, finish
from tutelage.core.files import write_json
from tutelage.core.fingerprint import fingerprint
from tutelage.core.progress import Reporter
from tutelage.records import VERDICTS, write_rows

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 4,
    "intermediate_size": 4, "num_attention_heads": 1, "vocab_size": 4,
}  # fmt: skip
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"a": 0}}, "added_tokens": []}
QUIET = Reporter(quiet=True)


@dataclass
class Lab:
    """Makes steps as a run does, in one cell or over several; `made` is what a stage is given."""

    root: Path
    made: dict[str, Artifact] = field(default_factory=dict)

    def step(
        self, name: str, stage: str, reads: Mapping[str, str] | None = None, *, cell: str = "",
        parameters: int = 0, seconds: float = 1.0, tokens: Mapping[str, int] | None = None,
        summary: Mapping[str, Any] | None = None, rows: Sequence[Mapping[str, Any]] | None = None,
        setting: Any = None,
    ) -> Artifact:  # fmt: skip
        """A finished step; `reads` maps a role to a step of the same cell.

        With `parameters` it holds a model of so many. Steps of one `setting` are one result.
        """
        role = f"{name}@{cell}" if cell else name
        inputs = {r: self.made[f"{s}@{cell}" if cell else s] for r, s in (reads or {}).items()}
        identity = {
            "stage": stage, "version": 1,
            "config": {"of": [name, cell] if setting is None else setting},
            "inputs": {r: artifact.fingerprint for r, artifact in inputs.items()},
        }  # fmt: skip
        place = self.root / stage / fingerprint(identity)
        if not place.exists():
            work = WorkDir.open(place.with_suffix(".partial"), reporter=QUIET, device="cpu")
            if parameters:
                write_model(work.path / "model", parameters)
            if rows is not None:
                write_rows(work.path / "verdicts.parquet", rows, VERDICTS)
            work.commit("all", seconds=seconds, tokens=tokens or {})
            finish(
                work, place, identity=identity, summary=summary or {}, provenance={},
                inputs={
                    r: {"stage": a.stage, "fingerprint": a.fingerprint,
                        "content": a.manifest["content"]}
                    for r, a in inputs.items()
                },
                peak_memory_bytes=1,
            )  # fmt: skip
        self.made[role] = Artifact(place, json.loads((place / "manifest.json").read_text()))
        return self.made[role]


def write_model(folder: Path, parameters: int) -> None:
    """A model by its headers: so many weights, all 0."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weights": np.zeros(parameters, np.float16)}, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer.json", TOKENIZER)


def verdicts(
    model: Artifact, correct: Sequence[float], *, test: str = "maze", mode: str = "fast",
    temperature: float = 0.0, tokens: int = 10, sample: int = 0, thinking: str | None = None,
    finish_reason: str = "stop", prompt: str = "from {item}",
) -> list[dict[str, Any]]:  # fmt: skip
    """A row an item, judged so."""
    return [
        {
            "model": model.fingerprint, "test": test, "item": f"item-{index}", "language": "en",
            "mode": mode, "temperature": temperature, "sample": sample,
            "prompt": prompt.format(item=index), "thinking": thinking, "answer": "R D",
            "gold": "R D", "correct": float(value), "reason": "", "tokens": tokens,
            "finish_reason": finish_reason,
        }
        for index, value in enumerate(correct)
    ]  # fmt: skip

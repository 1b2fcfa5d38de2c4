"""Answers that are remembered: by model, prompt and decoding, item by item.

An evaluation that was killed, made again with more items, or that shares prompts with another one,
asks the model only what it was never asked. The memory is one SQLite file of the store; it may be
deleted at any time.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tutelage.core.errors import ArtifactError
from tutelage.core.lock import file_lock
from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.sampler import TransformersSampler
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.load import Loaded

CHUNK_ROWS = 64
"""Answers between two commits; a crash costs at most so many. A batch, if that is more."""
CHUNK_BYTES = 64 * 2**20
"""Logits alive at a time while continuations are scored."""
LOCK_SECONDS = 120
TABLE = "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, ids BLOB, logps BLOB, end TEXT)"


class Answerer:
    """A model's answers and log-probabilities, through the memory at `memory` (none: no memory).

    `model` stands for its weights: the fingerprint of its artifact. A greedy answer that is
    remembered may differ from one made in another batch by float noise at near-ties.

    Raises ArtifactError when the memory is damaged or its disk is full.
    """

    def __init__(self, loaded: Loaded, *, model: str, batch_size: int, memory: Path | None) -> None:
        self._loaded, self._model, self._batch_size = loaded, model, batch_size
        self._memory = memory

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int],
        on_tokens: Callable[[int], None],
    ) -> list[Completion]:  # fmt: skip
        """See `Sampler.sample`."""
        sampler = TransformersSampler(
            self._loaded.model, batch_size=self._batch_size, device=str(self._loaded.device)
        )
        marks = [
            self._mark("sample", prompt, _decoding(params, key))
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        found: dict[int, Completion] = {}
        with self._open() as memory:
            for index, mark in enumerate(marks):
                if row := memory.get(mark):
                    found[index] = _completion(*row)
                    on_tokens(len(found[index].response_ids))
            missing = [index for index in range(len(prompts)) if index not in found]
            for chunk in _chunks(missing, max(CHUNK_ROWS, self._batch_size)):
                fresh = sampler.sample(
                    [prompts[i] for i in chunk], params, keys=[keys[i] for i in chunk],
                    on_tokens=on_tokens,
                )  # fmt: skip
                found.update(zip(chunk, fresh, strict=True))
                memory.put({marks[i]: _row(found[i]) for i in chunk})
        return [found[index] for index in range(len(prompts))]

    def label_logps(
        self, sequences: Sequence[Scorable], *, on_tokens: Callable[[int], None]
    ) -> list[np.ndarray]:
        """Log-probability of every response token (nats, temperature 1, float32)."""
        marks = [self._mark("logps", s.prompt_ids, list(s.response_ids)) for s in sequences]
        found: dict[int, np.ndarray] = {}
        scorer: TransformersScorer | None = None
        with self._open() as memory:
            for index, mark in enumerate(marks):
                if row := memory.get(mark):
                    found[index] = np.frombuffer(row[1], np.float32)
                    on_tokens(len(found[index]))
            missing = [index for index in range(len(sequences)) if index not in found]
            for chunk in _chunks(missing, 4 * CHUNK_ROWS):
                # Made when it is needed: it tries the model's head, which costs a forward pass.
                scorer = scorer or TransformersScorer(
                    self._loaded.model, device=str(self._loaded.device), chunk_bytes=CHUNK_BYTES
                )
                fresh = scorer.label_logps([sequences[i] for i in chunk], on_tokens=on_tokens)
                found.update(zip(chunk, fresh, strict=True))
                memory.put({marks[i]: (b"", _bytes(found[i], np.float32), "") for i in chunk})
        return [found[index] for index in range(len(sequences))]

    def _mark(self, kind: str, prompt: Sequence[int], more: object) -> bytes:
        content = json.dumps([kind, self._model, [int(i) for i in prompt], more])
        return hashlib.sha256(content.encode()).digest()

    @contextlib.contextmanager
    def _open(self) -> Iterator["_Memory"]:
        if self._memory is None:
            yield _Memory(None)
            return
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(self._memory, timeout=LOCK_SECONDS)) as opened:
                # One at a time: SQLite does not wait when two processes make a file WAL at once.
                with file_lock(self._memory.with_suffix(".lock")):
                    opened.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
                    opened.execute(TABLE)
                yield _Memory(opened)
        except sqlite3.DatabaseError as error:
            raise ArtifactError(
                f"{self._memory}: the memory of answers cannot be used ({error}); make room on its "
                "disk, or delete the file: answers are then made again"
            ) from error


class _Memory:
    """The open file, or none."""

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        self._connection = connection

    def get(self, mark: bytes) -> tuple[bytes, bytes, str] | None:
        if self._connection is None:
            return None
        query = "SELECT ids, logps, end FROM answers WHERE key = ?"
        return self._connection.execute(query, (mark,)).fetchone()

    def put(self, rows: dict[bytes, tuple[bytes, bytes, str]]) -> None:
        if self._connection is None:
            return
        with self._connection:
            self._connection.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                [(mark, *row) for mark, row in rows.items()],
            )


def _decoding(params: SamplingParams, key: int) -> list[object]:
    draw = [params.seed, int(key)] if params.temperature else []  # greedy: nothing is drawn
    return [params.max_tokens, params.temperature, sorted(params.stop_ids), draw]


def _bytes(values: Sequence[float] | np.ndarray, dtype: type[np.generic]) -> bytes:
    return np.asarray(values, dtype).tobytes()


def _row(completion: Completion) -> tuple[bytes, bytes, str]:
    ids, logps = completion.response_ids, completion.logps
    return _bytes(ids, np.int32), _bytes(logps, np.float32), completion.finish_reason


def _completion(ids: bytes, logps: bytes, end: str) -> Completion:
    return Completion(
        tuple(np.frombuffer(ids, np.int32).tolist()),
        tuple(np.frombuffer(logps, np.float32).tolist()),
        "stop" if end == "stop" else "length",
    )


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]

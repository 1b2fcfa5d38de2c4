"""Stage `magpie`: prompts that the teacher writes itself, from nothing but a user's opening.

Whether a prompt is worth an answer is not judged here; a `curate` step filters these like others.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from tutelage.core.artifact import Artifact, Site, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.files import write_json
from tutelage.core.shards import MakeShard, OnTokens, Shard, run_shards, shards
from tutelage.engines.base import Completion, SamplingParams
from tutelage.engines.opening import opened
from tutelage.recipe.curation import Magpie
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.text.chat import ChatFormat

COUNTS = "counts"  # in scratch, a file a shard: what a resumed run must still know
EMPTY, CUT_OFF, DUPLICATES = "empty", "cut_off", "duplicates"


def run(config: Magpie, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Sample `count` turns of a user; returns how many are rows and why the others are not.

    Equal prompts are found within a shard only. Raises ModelError where the teacher's template has
    no opening of a user's turn, DataError when no prompt is left.
    """
    run_shards(
        work, shards(config.count, config.shard_rows),
        partial(_writing, config, inputs, work.site()),
        label="teacher prompts", tokens_each=config.max_tokens,
    )  # fmt: skip
    return _summary(config, work)


@contextlib.contextmanager
def _writing(config: Magpie, inputs: Mapping[str, Artifact], site: Site) -> Iterator[MakeShard]:
    teacher = inputs["teacher"]
    with opened("teacher", inputs, site) as engine:
        chat = ChatFormat.from_tokenizer(engine.tokenizer)
        opening_ids, stop_ids = chat.user_opening(config.system)
        sampler = engine.sampler(batch_rows=config.batch_rows)
        params = SamplingParams(config.max_tokens, config.temperature, config.seed, stop_ids)

        def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
            keys = list(shard.items)
            done = sampler.sample([opening_ids] * len(keys), params, keys=keys, on_tokens=on_tokens)
            texts, left_out = _texts(chat, dict(zip(keys, done, strict=True)))
            rows = [_record(key, text, teacher, config) for key, text in texts.items()]
            write_rows(site.path / f"{shard.name}.parquet", rows, CONVERSATIONS)
            counts = {"rows": len(rows), **left_out}
            write_json(site.scratch(COUNTS) / f"{shard.name}.json", counts)
            return {"teacher_decoded": sum(len(c.response_ids) for c in done)}

        yield make


def _texts(
    chat: ChatFormat, done: Mapping[int, Completion]
) -> tuple[dict[int, str], dict[str, int]]:
    """What was written, by item, first come first kept; and how many are left out, by reason."""
    items: dict[str, int] = {}
    left_out = {EMPTY: 0, CUT_OFF: 0, DUPLICATES: 0}
    for item, completion in done.items():
        if completion.finish_reason == "length":
            left_out[CUT_OFF] += 1
            continue
        # Without the token that ended it: what ends a user's turn need not end an answer's.
        text = chat.decode_response(completion.response_ids[:-1], "fast")[1].strip()
        if not text:
            left_out[EMPTY] += 1
        elif items.setdefault(text, item) != item:
            left_out[DUPLICATES] += 1
    return {item: text for text, item in items.items()}, left_out


def _record(item: int, text: str, teacher: Artifact, config: Magpie) -> dict[str, Any]:
    turns = [("system", config.system)] if config.system else []
    return {
        "id": f"magpie/{config.seed}/{item}",
        "source": f"teacher:{teacher.fingerprint[:12]}",
        "language": config.language or None,
        "mode": "fast",
        "messages": [
            {"role": role, "content": content, "thinking": None}
            for role, content in [*turns, ("user", text)]
        ],
        "complete": True,
    }


def _summary(config: Magpie, work: WorkDir) -> dict[str, int]:
    shards = [json.loads(path.read_text()) for path in work.scratch(COUNTS).glob("*.json")]
    counts = {name: sum(shard[name] for shard in shards) for name in shards[0]}
    if not counts["rows"]:
        raise DataError(
            f"the teacher wrote no prompt in {config.count} tries: {counts[CUT_OFF]} cut off at "
            f"{config.max_tokens} tokens, {counts[EMPTY]} empty; raise max_tokens, or take a "
            "chat model"
        )
    return {"rows": counts["rows"], "asked": config.count, **counts}

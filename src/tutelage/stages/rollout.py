"""Stage `rollout`: the student answers the prompts once; ids and log-probs exactly as sampled."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

from tutelage.core.artifact import Artifact, Site, WorkDir
from tutelage.core.shards import MakeShard, OnTokens, Shard, run_shards, shards
from tutelage.engines.base import SamplingParams
from tutelage.engines.opening import opened
from tutelage.recipe.tables import Rollout
from tutelage.records import ROLLOUTS, RowFiles, prompt_messages, read_rows, write_rows
from tutelage.text.chat import ChatFormat


def run(config: Rollout, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Sample `samples` answers a prompt; returns counts, mean length and the share cut off."""
    total = len(RowFiles(inputs["prompts"].shards())) * config.samples
    run_shards(
        work, shards(total, config.shard_rows), partial(_answering, config, inputs, work.site()),
        label="student answers", tokens_each=config.max_tokens,
    )  # fmt: skip
    lengths = [
        (len(row["response_ids"]), row["finish_reason"] == "length")
        for row in read_rows(sorted(work.path.glob("part-*.parquet")))
    ]
    return {
        "rows": len(lengths),
        "mean_tokens": sum(length for length, _ in lengths) / len(lengths),
        "truncated_share": sum(cut for _, cut in lengths) / len(lengths),
    }


@contextlib.contextmanager
def _answering(config: Rollout, inputs: Mapping[str, Artifact], site: Site) -> Iterator[MakeShard]:
    prompts = list(read_rows(inputs["prompts"].shards()))
    with opened("model", inputs, site) as engine:
        chat = ChatFormat.from_tokenizer(engine.tokenizer)
        sampler = engine.sampler(batch_rows=config.batch_rows)
        params = SamplingParams(
            max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed,
            stop_ids=chat.stop_ids,
        )  # fmt: skip

        def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
            rows = [prompts[item // config.samples] for item in shard.items]
            prompt_ids = [chat.prompt_ids(prompt_messages(row), config.mode) for row in rows]
            # The key is the item's own number: a shard's answers do not depend on who samples it.
            done = sampler.sample(prompt_ids, params, keys=list(shard.items), on_tokens=on_tokens)
            records = [
                {
                    "id": f"{row['id']}/{config.mode}/{item % config.samples}",
                    "prompt_id": row["id"],
                    "source": row["source"],
                    "mode": config.mode,
                    "prompt_ids": ids,
                    "response_ids": list(answer.response_ids),
                    "student_logp": list(answer.logps),
                    "finish_reason": answer.finish_reason,
                    "text": chat.tokenizer.decode(list(answer.response_ids)),
                    "task": row["task"],
                    "language": row["language"],
                    "verdict": None,
                }
                for row, item, ids, answer in zip(rows, shard.items, prompt_ids, done, strict=True)
            ]
            write_rows(site.path / f"{shard.name}.parquet", records, ROLLOUTS)
            return {"student_decoded": sum(len(answer.response_ids) for answer in done)}

        yield make

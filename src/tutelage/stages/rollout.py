"""Stage `rollout`: the student answers the prompts once; ids and log-probs exactly as sampled."""

from collections.abc import Callable, Mapping

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.shards import Shard, run_shards
from tutelage.engines.base import SamplingParams
from tutelage.engines.sampler import TransformersSampler
from tutelage.models.load import load_for_inference
from tutelage.recipe.tables import Rollout
from tutelage.records import ROLLOUTS, prompt_messages, read_rows, write_rows
from tutelage.text.chat import ChatFormat


def run(config: Rollout, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Sample `samples` answers a prompt; returns counts, mean length and the share cut off."""
    prompts = list(read_rows(inputs["prompts"].shards()))
    loaded = load_for_inference(inputs["model"], device=work.device)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    sampler = TransformersSampler(
        loaded.model, batch_size=config.batch_rows, device=str(loaded.device)
    )
    params = SamplingParams(
        max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed,
        stop_ids=chat.stop_ids,
    )  # fmt: skip

    def make(shard: Shard, on_tokens: Callable[[int], None]) -> dict[str, int]:
        rows = [prompts[item // config.samples] for item in shard.items]
        prompt_ids = [chat.prompt_ids(prompt_messages(row), config.mode) for row in rows]
        # The key is the item's own number, so a shard's answers do not depend on who samples it.
        done = sampler.sample(prompt_ids, params, keys=list(shard.items), on_tokens=on_tokens)
        records = [
            {
                "id": f"{row['id']}/{config.mode}/{item % config.samples}",
                "prompt_id": row["id"],
                "source": row["source"],
                "mode": config.mode,
                "prompt_ids": ids,
                "response_ids": list(completion.response_ids),
                "student_logp": list(completion.logps),
                "finish_reason": completion.finish_reason,
                "text": chat.tokenizer.decode(list(completion.response_ids)),
            }
            for row, item, ids, completion in zip(rows, shard.items, prompt_ids, done, strict=True)
        ]
        write_rows(work.path / f"{shard.name}.parquet", records, ROLLOUTS)
        return {"student_decoded": sum(len(c.response_ids) for c in done)}

    total = len(prompts) * config.samples
    run_shards(
        work, total, config.shard_rows, make, label="student answers", tokens_each=config.max_tokens
    )
    lengths = [
        (len(row["response_ids"]), row["finish_reason"] == "length")
        for row in read_rows(sorted(work.path.glob("part-*.parquet")))
    ]
    return {
        "rows": len(lengths),
        "mean_tokens": sum(length for length, _ in lengths) / len(lengths),
        "truncated_share": sum(cut for _, cut in lengths) / len(lengths),
    }

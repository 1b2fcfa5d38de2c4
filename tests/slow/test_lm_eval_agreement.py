"""Our path through lm-evaluation-harness against lm_eval's own model class, on the same rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install tutelage[evals]")

from tutelage.evals.harness import TaskResult, run_task

pytestmark = pytest.mark.slow

TOKENS = 96
SUMS = [
    ("Tom has 3 red balls and 4 blue balls. How many balls does Tom have?", 7),
    ("A pen costs 2 dollars. How many dollars do 6 pens cost?", 12),
    ("Anna had 10 apples and gave 3 to Ben. How many apples does Anna have left?", 7),
    ("A train has 5 cars with 20 seats each. How many seats does the train have?", 100),
    ("Lily reads 4 pages a day. How many pages does she read in 9 days?", 36),
    ("There are 18 cookies for 3 children. How many cookies does each child get?", 6),
]
SHOTS = [
    ("Sam has 2 cats and gets 2 more. How many cats does Sam have?", 4),
    ("A box holds 8 eggs. How many eggs do 3 boxes hold?", 24),
    ("Eve had 9 dollars and spent 4. How many dollars does Eve have left?", 5),
]


def written(path: Path, sums: Sequence[tuple[str, int]]) -> Path:
    rows = [{"question": asked, "answer": f"The answer is {n}.\n#### {n}"} for asked, n in sums]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.filterwarnings("ignore")  # of lm_eval's own model class
def test_lm_eval_itself_gets_every_answer_and_every_metric_of_gsm8k_alike(
    shots: int, smol_dir: Path, tmp_path: Path
) -> None:
    asked, examples = written(tmp_path / "a.jsonl", SUMS), written(tmp_path / "b.jsonl", SHOTS)
    ours = by_us(asked, examples, smol_dir, shots=shots, max_tokens=TOKENS)
    theirs = by_lm_eval(asked, examples, smol_dir, tmp_path, shots=shots, max_tokens=TOKENS)
    assert [item.answer for item in ours.items] == [s["resps"][0][0] for s in theirs["samples"]]
    assert [item.correct for item in ours.items] == [s["exact_match"] for s in theirs["samples"]]
    assert dict(ours.all) == {key: theirs["results"][key] for key in ours.all}


def by_us(
    asked: Path, examples: Path, model_dir: Path, *, shots: int, max_tokens: int, limit: int = 0
) -> TaskResult:
    """GSM8K with our sampler, in float32."""
    from transformers import AutoModelForCausalLM

    from tutelage.engines.base import SamplingParams
    from tutelage.engines.sampler import TransformersSampler
    from tutelage.recipe.evaluation import Task
    from tutelage.text.chat import ChatFormat
    from tutelage.text.tokenizer import load_tokenizer

    chat = ChatFormat.from_tokenizer(load_tokenizer(model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    sampler = TransformersSampler(model, batch_size=8, device="cpu")

    def generate(prompts: Any, max_tokens: int, temperature: float) -> list[tuple[Any, str]]:
        params = SamplingParams(max_tokens, temperature, 0, chat.stop_ids)
        keys = list(range(len(prompts)))
        made = sampler.sample(prompts, params, keys=keys, on_tokens=lambda count: None)
        return [(one.response_ids, one.finish_reason) for one in made]

    def logps(prompts: Any, responses: Any) -> NoReturn:
        raise AssertionError("GSM8K is no multiple choice")

    task = Task(
        name="gsm8k", source=str(asked), shots_source=str(examples), shots=shots, limit=limit
    )
    return run_task(task, chat=chat, generate=generate, logps=logps, max_tokens=max_tokens)


def by_lm_eval(
    asked: Path, examples: Path, model_dir: Path, folder: Path, *, shots: int, max_tokens: int,
    limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same by lm_eval alone: its model class, with the chat template that we export."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tutelage.evals.benchmarks import task_files
    from tutelage.text.chat import exported_template

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = exported_template(tokenizer.chat_template)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    lines = [
        f"include: {task_files()['gsm8k']}", "task: here", "dataset_path: json",
        "dataset_name: null", f"num_fewshot: {shots}", "dataset_kwargs:",
        f"  data_files: {{test: {asked}, train: {examples}}}", f"  cache_dir: {folder}",
    ]  # fmt: skip
    (folder / "here.yaml").write_text("\n".join(lines))
    run, model_class = cast(Any, simple_evaluate), cast(Any, HFLM)  # decorated without types
    found = run(
        model=model_class(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[str(folder / "here.yaml")], task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True, fewshot_as_multiturn=False, limit=limit, bootstrap_iters=0,
        fewshot_random_seed=0, gen_kwargs={"max_gen_toks": max_tokens},
    )  # fmt: skip
    samples = [s for s in found["samples"]["here"] if s["filter"] == "flexible-extract"]
    return {"samples": samples, "results": found["results"]["here"]}

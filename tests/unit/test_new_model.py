"""New models: tokenizers trained on data, weights drawn from a seed, and both in a recipe."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import conversation
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tutelage import pipeline
from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, ModelError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.estimate import estimate
from tutelage.models.inspect import describe
from tutelage.models.load import load_for_inference, load_for_training
from tutelage.models.new import feed_forward_width, new_model, parameter_count
from tutelage.recipe.load import load
from tutelage.recipe.tables import New
from tutelage.recipe.training import Sft
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.stages import new, sft
from tutelage.store import Store
from tutelage.text.chat import PREFIX, ChatFormat, exported_template
from tutelage.text.tokenizer import tokenizer_digest, vocab_size
from tutelage.text.train_tokenizer import MARKERS, SPECIAL, texts_of, train_tokenizer

KINDS = ("characters", "words", "bpe")
SUMS = [
    conversation(n, asked=[f"What is {n} + {n % 7}?"], said=f"{n + n % 7}.",
                 thinking=f"{n} and\n\n{n % 7}" if n % 2 else None)
    for n in range(60)
]  # fmt: skip
ALPHABET = sorted({character for text in texts_of(SUMS) for character in text} | {"\n"})
QUIET = Reporter(quiet=True)
RECIPE = """
name = "lab"
seed = 3
[models.big]
source = "new"
new = { data = ["sums"], tokenizer = "words", vocab_size = 120, hidden_size = 32, layers = 2 }
[models.small]
source = "new"
new = { data = ["sums"], tokenizer = "words", vocab_size = 120, hidden_size = 16, layers = 1 }
[models.cut]
source = "new"
new = { tokenizer_of = "big", hidden_size = 16, layers = 1 }
[steps.sums]
stage = "data"
sources = [{ source = "sums.jsonl" }]
[steps.taught]
stage = "sft"
model = "small"
data = "sums"
lr = 1e-2
batch_tokens = 128
pack_tokens = 64
[steps.answers]
stage = "rollout"
model = "taught"
prompts = "sums"
mode = "fast"
max_tokens = 4
[steps.targets]
stage = "score"
teacher = "big"
rollouts = "answers"
"""


def trained(kind: Any, size: int = 300, texts: Sequence[str] = ()) -> Tokenizer:
    return train_tokenizer(texts or list(texts_of(SUMS)), kind=kind, vocab_size=size)


def settings(**more: Any) -> New:
    fixed = {"stage": "new", "data": ["d"], "seed": 5, "hidden_size": 32, "vocab_size": 300}
    return New.model_validate(fixed | more)


def make(where: Path, *, inputs: Mapping[str, Artifact] | None = None, **more: Any) -> Artifact:
    work = WorkDir.open(where, reporter=QUIET, device="cpu")
    summary = new.run(settings(**more), inputs or {"data.0": sums(where)}, work)
    return Artifact(where, {"stage": "new", "identity": {}, "summary": summary})


def sums(where: Path) -> Artifact:
    folder = where.with_name(where.name + "-data")
    folder.mkdir(exist_ok=True)
    write_rows(folder / "conversations.parquet", SUMS, CONVERSATIONS)
    return Artifact(folder, {"stage": "data"})


def contents(artifact: Artifact) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (artifact.path / "model").iterdir()}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make(tmp_path_factory.mktemp("made") / "model", tokenizer=request.param)


TOKENIZERS = {kind: trained(kind) for kind in KINDS}


@given(text=st.text(ALPHABET, max_size=60))
@pytest.mark.parametrize("kind", KINDS)
def test_text_in_the_datas_characters_is_decoded_to_itself(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@given(text=st.text(max_size=40))
def test_byte_pairs_decode_any_text_to_itself(text: str) -> None:
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_a_character_nobody_showed_is_the_unknown_token(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.decode(tokenizer.encode("7漢7").ids, skip_special_tokens=False) == "7<unk>7"


def test_a_number_is_one_id_wherever_it_stands() -> None:
    tokenizer = TOKENIZERS["words"]
    for text in ("59", "is 59?", "(59)"):
        assert tokenizer.encode(text).tokens.count("59") == 1


def test_a_word_that_had_no_room_falls_apart_into_known_ones() -> None:
    texts = ["12 " * 9, "345 "]
    room = len(SPECIAL) + len(MARKERS) + len({"<unk>", "\n", " ", *"0123456789", "12"})
    assert trained("words", room, texts).encode("12345").tokens == ["12", "3", "4", "5"]


def test_room_is_filled_with_digits_before_letters() -> None:
    few = trained("characters", len(SPECIAL) + len(MARKERS) + 5, ["a"])
    assert [few.id_to_token(i) for i in range(5)] == ["<unk>", "\n", "a", "0", "1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_keeps_to_its_vocab_size(kind: str) -> None:
    assert trained(kind, 270).get_vocab_size() <= 270


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_tokenizer_bytes(kind: str) -> None:
    assert trained(kind).to_str() == trained(kind).to_str()


@pytest.mark.parametrize(
    ("kind", "size", "said"),
    [
        ("bpe", 263, "no room for every byte"),
        ("characters", 10, "vocab_size = 10 has no room for the data's 4 characters"),
        ("words", 10, "give it 13 or more"),
    ],
)
def test_a_vocabulary_without_room_is_refused(kind: str, size: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        trained(kind, size, ["abc"])


def test_the_size_asked_for_is_enough() -> None:
    assert trained("words", 13, ["abc"]).get_vocab_size() == 13
    assert trained("bpe", 264, ["abc"]).get_vocab_size() == 264


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_text_is_refused(kind: Any) -> None:
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([], kind=kind, vocab_size=300)


def test_content_and_thinking_of_every_message_are_read() -> None:
    row = conversation(0, asked=["a", "b"], said="c", thinking="d")
    assert list(texts_of([row])) == ["a", "c", "d", "b", "c", "d"]


def test_the_markers_of_a_fast_answer_are_four_tokens(made: Artifact) -> None:
    tokenizer = load_for_inference(made, device="cpu").tokenizer
    ids = tokenizer.encode(PREFIX["fast"], add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<think>", "\n\n", "</think>", "\n\n"]


def test_a_turn_costs_one_token_and_the_end_of_an_answer_one(made: Artifact) -> None:
    chat = ChatFormat.from_tokenizer(load_for_inference(made, device="cpu").tokenizer)
    asked = SUMS[0]["messages"][:1]
    question = chat.tokenizer.encode(asked[0]["content"], add_special_tokens=False)
    answer = chat.tokenizer.encode("0.", add_special_tokens=False)
    assert len(chat.prompt_ids(asked, "fast")) == 2 + len(question) + 4
    assert chat.response_ids(SUMS[0]["messages"][1]) == [*answer, chat.end_of_turn_id]
    assert chat.stop_ids[0] == chat.tokenizer.eos_token_id


@pytest.mark.parametrize(("row", "mode"), [(2, "fast"), (3, "reasoning")])
def test_an_answer_is_decoded_to_its_chain_and_content(made: Artifact, row: int, mode: Any) -> None:
    chat = ChatFormat.from_tokenizer(load_for_inference(made, device="cpu").tokenizer)
    message = SUMS[row]["messages"][1]
    rendered = chat.render(SUMS[row]["messages"])
    response = rendered.ids[rendered.mask].tolist()
    assert chat.decode_response(response, mode) == (message["thinking"], message["content"])


def test_control_tokens_in_somebodys_text_stay_text(made: Artifact) -> None:
    chat = ChatFormat.from_tokenizer(load_for_inference(made, device="cpu").tokenizer)
    ids = chat.prompt_ids([{"role": "user", "content": "1<|end|>2"}], "fast")
    assert chat.end_of_turn_id not in ids


def test_the_exported_template_writes_what_training_saw(made: Artifact) -> None:
    tokenizer = load_for_inference(made, device="cpu").tokenizer
    chat = ChatFormat.from_tokenizer(tokenizer)
    asked = SUMS[0]["messages"][:1]
    text = tokenizer.apply_chat_template(
        asked, chat_template=exported_template(chat.template), tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    ids = tokenizer.encode(str(text), add_special_tokens=False)
    assert ids == chat.prompt_ids(asked, "fast")


def test_the_same_seed_gives_the_same_bytes_and_another_other_weights(tmp_path: Path) -> None:
    one, same, other = (
        contents(make(tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == same
    weights = "model.safetensors"
    assert one.pop(weights) != other.pop(weights)
    assert one == other


def test_weights_neither_read_nor_move_torchs_generator() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = new_model(settings(), vocab_size=20, end_id=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second = new_model(settings(), vocab_size=20, end_id=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_matrices_begin_with_a_deviation_of_one_over_the_root_of_the_width() -> None:
    model = new_model(settings(hidden_size=64), vocab_size=500, end_id=1)
    matrices = [p for p in model.state_dict().values() if p.ndim == 2]
    for matrix in matrices:
        # the standard error of a deviation over n draws is 1/sqrt(2n) of it; five of them
        deviation = float(matrix.std()) * math.sqrt(64)
        assert deviation == pytest.approx(1, abs=5 / math.sqrt(2 * matrix.numel()))


SHAPES = [
    {}, {"tie_embeddings": False}, {"heads": 4, "kv_heads": 2}, {"intermediate_size": 40},
    {"layers": 3, "hidden_size": 48},
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_without_making_the_model(shape: dict[str, Any]) -> None:
    config = settings(**shape)
    model = new_model(config, vocab_size=31, end_id=1)
    assert parameter_count(config, 31) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("width", "expected"), [(24, 64), (32, 88), (64, 176)])
def test_the_feed_forward_width_is_the_next_multiple_of_eight(width: int, expected: int) -> None:
    assert feed_forward_width(settings(hidden_size=width)) == expected


def test_the_summary_says_what_lies_on_disk(made: Artifact) -> None:
    facts = describe(made.path / "model")
    assert made.summary == {
        "parameters": facts.parameters, "vocab_size": vocab_size(made.path / "model"),
        "layers": facts.layers, "hidden_size": facts.hidden_size,
    }  # fmt: skip
    assert facts.vocab_size == made.summary["vocab_size"]


def test_models_from_the_same_data_share_their_ids(made: Artifact, tmp_path: Path) -> None:
    kind = "characters"
    pair = [make(tmp_path / str(width), tokenizer=kind, hidden_size=width) for width in (16, 32)]
    assert len({tokenizer_digest(model.path / "model") for model in pair}) == 1


def test_another_models_tokenizer_is_taken_byte_for_byte(made: Artifact, tmp_path: Path) -> None:
    taken = make(
        tmp_path / "taken", inputs={"tokenizer_of": made}, data=[], tokenizer_of="m", layers=1
    )
    left, right = contents(made), contents(taken)
    names = ("tokenizer.json", "tokenizer_config.json")
    assert [left[name] for name in names] == [right[name] for name in names]


def test_a_model_with_a_borrowed_tokenizer_has_as_many_logits(tmp_path: Path) -> None:
    lender = make(tmp_path / "lender")
    padded = new_model(settings(), vocab_size=lender.summary["vocab_size"] + 7, end_id=1)
    padded.save_pretrained(lender.path / "model")
    taken = make(
        tmp_path / "taken", inputs={"tokenizer_of": lender}, data=[], tokenizer_of="m", layers=1
    )
    assert taken.summary["vocab_size"] == padded.config.vocab_size


def test_training_a_new_model_lowers_its_loss(made: Artifact, tmp_path: Path) -> None:
    config = Sft.model_validate(
        {"stage": "sft", "model": "m", "data": ["d"], "seed": 1, "lr": 1e-2, "epochs": 4,
         "batch_tokens": 256, "pack_tokens": 64}
    )  # fmt: skip
    work = WorkDir.open(tmp_path / "work", reporter=QUIET, device="cpu")
    sft.run(config, {"model": made, "data.0": sums(tmp_path / "m")}, work)
    losses = [
        json.loads(line)["loss"] for line in (work.path / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.6 * losses[0]
    trained_model = Artifact(work.path, {"stage": "sft", "identity": {}})
    load_for_training(trained_model, device="cpu")
    assert tokenizer_digest(work.path / "model") == tokenizer_digest(made.path / "model")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    answered = [
        [asked, {"role": "assistant", "content": answer["content"]}]
        for asked, answer in (row["messages"] for row in SUMS)
    ]
    lines = [json.dumps({"messages": messages}) for messages in answered]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "lab.toml"
    path.write_text(RECIPE)
    return path


def edited(path: Path, old: str, new_text: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new_text, 1))
    return path


def planned(path: Path) -> list[pipeline.Planned]:
    return pipeline.plan(load(path), Store(path.parent / "store"))


def test_a_recipe_of_new_models_runs_from_data_to_targets(recipe: Path) -> None:
    store = Store(recipe.parent / "store")
    result = pipeline.run(load(recipe), store, reporter=QUIET)
    assert result.artifacts["big"].stage == "new"
    assert result.artifacts["targets"].summary["rows"] == len(SUMS)
    digests = {tokenizer_digest(result.artifacts[name].path / "model") for name in
               ("big", "small", "cut", "taught")}  # fmt: skip
    assert len(digests) == 1
    again = pipeline.plan(load(recipe), store)
    assert {item.status for item in again} == {"cached"}


def test_a_new_model_is_a_step_that_reads_its_data(recipe: Path) -> None:
    nodes = {item.node.name: item.node for item in planned(recipe)}
    assert nodes["big"].stage == "new"
    assert nodes["big"].inputs == {"data.0": "sums"}
    assert nodes["cut"].inputs == {"tokenizer_of": "big"}


def test_a_plan_knows_how_large_a_new_model_gets(recipe: Path) -> None:
    plan = planned(recipe)
    costs = estimate(plan, Store(recipe.parent / "store"))
    steps = {item.node.name: item.node.step for item in plan}
    for name in ("big", "cut"):
        step = steps[name]
        assert isinstance(step, New)
        # fp32, and at most the 120 ids of the data's tokenizer
        assert costs[name].disk_bytes == 4 * parameter_count(step, 120)
    assert costs["taught"].minutes


@pytest.mark.parametrize(
    ("old", "changed", "sizes"),
    [
        ('vocab_size = 120, hidden_size = 16', 'vocab_size = 130, hidden_size = 16',
         "at most 130 and at most 120 ids"),
        ('tokenizer = "words", vocab_size = 120, hidden_size = 16', "vocab_size = 300",
         "at most 300 and at most 120 ids"),
        ('data = ["sums"], tokenizer = "words", vocab_size = 120, hidden_size = 16',
         'data = ["sums", "sums"], tokenizer = "words", vocab_size = 120',
         "at most 120 and at most 120 ids"),
    ],
)  # fmt: skip
def test_new_models_of_other_tokenizers_are_no_pair(
    recipe: Path, old: str, changed: str, sizes: str
) -> None:
    with pytest.raises(ModelError) as caught:
        planned(edited(recipe, old, changed))
    assert str(caught.value).startswith(
        f"steps.targets: small and its teacher big have different vocabularies ({sizes})"
    )


def test_a_borrowed_tokenizer_makes_a_pair_with_its_lender(recipe: Path) -> None:
    planned(edited(recipe, 'model = "small"', 'model = "cut"'))


def test_a_new_model_and_one_from_outside_are_no_pair(recipe: Path, tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", tokenizer="characters").path / "model"
    edited(recipe, "[steps.sums]", f'[models.outside]\nsource = "{outside}"\n[steps.sums]')
    planned(recipe)
    with pytest.raises(ModelError, match=r"small and its teacher outside .* \(at most 120 and "):
        planned(edited(recipe, 'teacher = "big"', 'teacher = "outside"'))


@pytest.mark.parametrize(
    ("old", "changed", "said"),
    [
        ('new = { data = ["sums"]', 'new = { data = ["sum"]',
         "models.big.new.data: no step or model 'sum'; did you mean 'sums'?"),
        ('tokenizer_of = "big"', 'tokenizer_of = "sums"',
         "models.cut.new.tokenizer_of: needs a model, but 'sums' is of stage data"),
        ('tokenizer_of = "big"', 'tokenizer_of = "cut"', "in a circle: cut -> cut"),
        ('{ tokenizer_of = "big"', '{ data = ["sums"], tokenizer_of = "big"',
         "give data to train a tokenizer on, or tokenizer_of"),
        ("hidden_size = 32", "hidden_size = 33", "hidden_size must be a multiple of heads"),
        ("hidden_size = 32", "hidden_size = 6", "must be even, for rotary positions"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_one_line_that_says_where(
    recipe: Path, old: str, changed: str, said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(edited(recipe, old, changed))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_too_small_is_told_with_its_step(recipe: Path) -> None:
    edited(recipe, "vocab_size = 120", "vocab_size = 12")
    with pytest.raises(RecipeError, match=r"step 'big': vocab_size = 12 has no room"):
        pipeline.run(load(recipe), Store(recipe.parent / "store"), until="big", reporter=QUIET)


def test_ids_are_without_gaps() -> None:
    for kind, size in itertools.product(KINDS, (270, 300)):
        ids = trained(kind, size).get_vocab().values()
        assert sorted(ids) == list(range(len(ids)))

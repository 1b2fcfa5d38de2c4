"""What each row filter drops and keeps, one by one and over lists of rows."""

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import tutelage.data
from tutelage.core.errors import DataError, RecipeError
from tutelage.data import filters
from tutelage.data.filters import NamedFilter, apply_filters, build_filters
from tutelage.recipe.filters import AnyFilter

ALL: list[dict[str, Any]] = [
    {"name": "length", "min_tokens": 2, "max_tokens": 1000},
    {"name": "encoding"},
    {"name": "repetition"},
    {"name": "think-markers"},
    {"name": "answer-missing"},
    {"name": "refusal"},
    {"name": "language", "keep": ["en", "zh", "de", "es", "fr", "ja"]},
]
NAMES = [table["name"] for table in ALL]

PROMPTS = [
    json.loads(line)["prompt"]
    for line in (Path(tutelage.data.__file__).parent / "prompts.jsonl").read_text().splitlines()
]

CODE = '''def transpose(rows):
    """Turn rows into columns."""
    if not rows:
        return []
    width = len(rows[0])
    for row in rows:
        if len(row) != width:
            raise ValueError("rows differ in length")
    return [[row[i] for row in rows] for i in range(width)]


assert transpose([[1, 2], [3, 4]]) == [[1, 3], [2, 4]]
assert transpose([[0, 0, 0], [0, 0, 0]]) == [[0, 0], [0, 0], [0, 0]]
assert transpose([]) == []
'''
MARKUP = "\n".join(
    f'<li class="nav-item"><a class="nav-link" href="#">Page {n}</a></li>' for n in range(30)
)
SCHEMA = ",\n".join(
    f'{{\n  "name": "field_{n}",\n  "type": "string",\n  "required": true,\n  "default": null,\n'
    '  "nullable": false,\n  "indexed": false\n}'
    for n in range(20)
)
TABLE = "| month | rain | snow |\n| --- | --- | --- |\n" + "\n".join(
    f"| {month} | {n} mm | {n * 2} mm |" for n, month in enumerate(("Jan", "Feb", "Mar", "Apr"))
)
TIMES = "\n".join(f"7 x {n} = {7 * n}" for n in range(1, 31))
ZEROS = "The result is\n" + "\n".join("0 0 0 0 0 0 0 0 0 0" for _ in range(10))
CHORUS = "Row along the river, row along the stream,\nall the willows whisper like a morning dream."
SONG = "\n\n".join(
    f"{verse}\n\n{CHORUS}"
    for verse in (
        "At dawn the miller's daughter untied the little boat\nand wrapped against the mist "
        "her father's heavy coat.",
        "She passed beneath the bridges, she passed the chapel wall,\nand every bird that saw "
        "her set up a hungry call.",
        "By noon the sun was burning the colour from the hay,\nthe ferryman was sleeping, his "
        "ferry gone astray.",
        "At night she reached the harbour where lanterns swing and burn,\nand sold her sacks of "
        "barley, and waited to return.",
    )
)
ORDINARY = [
    *PROMPTS, CODE, MARKUP, SCHEMA, TABLE, TIMES, ZEROS, SONG, "Wow " + "!" * 60, "=" * 120,
    f"```html\n{MARKUP}\n```", "Tab\there\r\nand there", "One icon \uf0b7 alone", "👩‍👩‍👧 🇫🇷 🫨🫨",
    "Straße, Ärger, Ödland: „Ä“ und „Ö“ sind Umlaute.", "NÃO! A MANHÃ… A IRMÃ” e o pão",
    "La letra «Ñ» está en ESPAÑA…", "« Â » porte un accent, comme dans âge et château.",
    "A cell of 5 Å³ at 20 °C, ½×½×½ and 3×²",
    "Vâng ạ, tôi đồng ý. Việt Nam", "Þórður og Æsa í Ðali",
    "Πρόγραμμα και αλφάβητο", "Привет, мир", "שלום עולם", "مرحبا بالعالم", "한국어 문장입니다",
]  # fmt: skip


def row(question: str, answer: str | None, *, thinking: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question, "thinking": None}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer, "thinking": thinking})
    return {
        "id": "a", "source": "s", "language": None, "mode": "reasoning" if thinking else "fast",
        "messages": messages, "complete": True, "answer": None, "task": None, "meta": None,
    }  # fmt: skip


def built(*tables: dict[str, Any]) -> list[NamedFilter]:
    known: TypeAdapter[AnyFilter] = TypeAdapter(AnyFilter)
    return build_filters(
        [known.validate_python(table) for table in tables], count_tokens=lambda s: len(s.split())
    )


BUILT = dict(zip(NAMES, built(*ALL), strict=True))


def reason(name: str, a_row: dict[str, Any], **options: Any) -> str | None:
    found = built({"name": name, **options})[0] if options else BUILT[name]
    return found.reason(a_row)


def kept(some: Sequence[NamedFilter], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in rows if apply_filters(some, each) is None]


# What each filter must find, put into an ordinary text
DAMAGE: dict[str, st.SearchStrategy[str]] = {
    "length": st.integers(1001, 1500).map(lambda n: "word " * n),
    "encoding": st.one_of(
        st.sampled_from(["\ufffd", "\x00", "\x1b", "\x7f", "\x85", "\ud83d", "\ue000\ue001"]),
        st.sampled_from([p for p in PROMPTS if not p.isascii()]).map(
            lambda text: text.encode().decode("cp1252", errors="ignore")
        ),
    ),
    "repetition": st.tuples(st.sampled_from(PROMPTS), st.integers(12, 40)).map(
        lambda found: " ".join([found[0]] * found[1])
    ),
    "think-markers": st.sampled_from(
        ["<think>", "</think>", "</think> a <think>", "<think> a <think> b </think> c </think>"]
    ),
}
PLANTED = st.sampled_from(list(DAMAGE)).flatmap(lambda name: st.tuples(st.just(name), DAMAGE[name]))
ANSWERS = st.one_of(
    st.sampled_from(ORDINARY),
    PLANTED.map(lambda found: found[1]),
    st.sampled_from(["", " \n", "...", "As an AI language model, I have no body.", "Å, это Ã©"]),
    st.text(max_size=60),
)
ROWS = st.lists(
    st.builds(row, st.sampled_from(PROMPTS), st.none() | ANSWERS, thinking=st.none() | ANSWERS),
    max_size=6,
)
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(rows=ROWS)
def test_filtering_is_idempotent_keeps_the_order_and_changes_no_row(
    name: str, rows: list[dict[str, Any]]
) -> None:
    before = copy.deepcopy(rows)
    once = kept([BUILT[name]], rows)
    assert rows == before
    assert kept([BUILT[name]], once) == once
    alone = [found for each in rows for found in kept([BUILT[name]], [each])]
    assert [*map(id, once)] == [*map(id, alone)]
    assert [*map(id, kept([BUILT[name]], rows[::-1]))] == [*map(id, once[::-1])]


@QUICK
@given(rows=ROWS)
def test_the_first_filter_that_drops_a_row_names_the_reason(rows: list[dict[str, Any]]) -> None:
    for each in rows:
        reasons = [(name, BUILT[name].reason(each)) for name in NAMES]
        expected = next((found for found in reasons if found[1]), None)
        assert apply_filters(list(BUILT.values()), each) == expected


@settings(max_examples=150, deadline=None)
@given(planted=PLANTED, around=st.sampled_from(PROMPTS), where=st.sampled_from(["user", "answer"]))
def test_planted_damage_is_found(planted: tuple[str, str], around: str, where: str) -> None:
    name, damage = planted
    text = f"{around}\n{damage}\n"
    assert reason(name, row(text, "Yes.") if where == "user" else row("Why?", text))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "language"])
def test_ordinary_text_and_code_is_kept_as_question_and_as_answer(name: str) -> None:
    signs = [text for text in ORDINARY if not any(map(str.isalnum, text))]
    for text in ORDINARY:
        answer = "Yes." if text in signs else text
        assert reason(name, row(text, answer)) is None, text


def test_prose_of_six_languages_and_code_is_kept_by_language() -> None:
    for text in [*PROMPTS, CODE, MARKUP, SCHEMA, TABLE, TIMES, ZEROS, SONG]:
        assert reason("language", row(text, text)) is None, text


# -------------------------------------------------------------------------- tables and building


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"name": "length"}, "length sets no limit"),
        ({"name": "length", "min_tokens": 9, "max_tokens": 3}, "min_tokens 9 is over"),
        ({"name": "language"}, "keep"),
        ({"name": "language", "keep": []}, "keep"),
        ({"name": "repetition", "max_share": 1.5}, "max_share"),
        ({"name": "encoding", "strict": True}, "strict"),
        ({"name": "profanity"}, "profanity"),
    ],
)
def test_a_table_that_cannot_be_is_refused(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        built(table)


def test_filters_come_in_the_order_of_the_recipe() -> None:
    assert [each.name for each in built(*ALL[::-1])] == NAMES[::-1]


def test_length_without_a_tokenizer_is_an_error_of_the_recipe() -> None:
    table = TypeAdapter(AnyFilter).validate_python({"name": "length", "max_tokens": 3})
    with pytest.raises(RecipeError, match="length counts tokens"):
        build_filters([table], count_tokens=None)


def test_language_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(DataError, match=r'pip install "tutelage\[data\]"'):
        filters._identifier.__wrapped__(frozenset({"en"}))


def test_a_language_nobody_knows_is_an_error_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match="keep names xq"):
        built({"name": "language", "keep": ["en", "xq"]})


# ----------------------------------------------------------------------------------------- length


def test_length_limits_are_inclusive_and_count_chains() -> None:
    found = row("one two three", "four five", thinking="six seven")
    for option, edge in [("max_tokens", 7), ("max_prompt_tokens", 3), ("max_answer_tokens", 4)]:
        assert reason("length", found, **{option: edge}) is None
        assert f"over {option} {edge - 1}" in str(reason("length", found, **{option: edge - 1}))
    assert reason("length", found, min_tokens=7) is None
    assert reason("length", found, min_tokens=8) == "7 tokens, under min_tokens 8"


def test_a_reason_of_length_shows_its_figure() -> None:
    long = row("word " * 1532, None)
    assert reason("length", long, max_tokens=1024) == "1,532 tokens, over max_tokens 1,024"


# --------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize(
    "text",
    [
        "cafÃ©", "Itâ€™s", "Ã–ffnung", "Ãœber", "20Â°C", "naÃ¯ve", "ÄnderÅ›", "Å‚Ã³dÅº", "a â†’ b",
        "ðŸ˜€", "ï»¿Hello", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "ä½ å¥½ä¸–ç•Œ", "锟斤拷", "縺薙ｓ縺ｫ縺｡縺ｯ", "NoÃ«l",
        "Ù…Ø±Ø­Ø¨Ø§", "×©×œ×•×", "Ã\xa0 la carte", "bad\ufffd", "nul\0", "\ufdd0",
        "\U000e0080\uffff", "2ä¸ª",
    ],
)  # fmt: skip
def test_text_decoded_wrongly_is_dropped_and_the_place_is_named(text: str) -> None:
    assert "of message 1 (content)" in str(reason("encoding", row("Hi", f"It says {text}")))
    assert "of message 1 (thinking)" in str(reason("encoding", row("Hi", "ok", thinking=text)))


# ------------------------------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    "text",
    [
        "So the answer is four because two and two is four. " * 10,
        "the " * 60,
        "我认为这个问题的答案是四，因为二加二等于四。" * 8,
        "これは正しい答えだと思います。" * 8,
        "word" + "a" * 60,
        "哈" * 50,
        "#" * 300,
        "😀" * 250,
        "1 " * 500,
        "start" + "\n" * 1200,
        "```\n" + "x = x + one\ny = y + two\n" * 20 + "```",
        "Fine so far, and then it goes on.\n" + "I do not know.\n" * 20,
        "\n".join(f"Step {n}: look at the next number and see that it is fine." for n in range(40)),
    ],
)
def test_a_loop_is_dropped(text: str) -> None:
    assert reason("repetition", row("Go on", text))


def test_a_loop_in_a_chain_is_dropped_and_says_so() -> None:
    found = reason("repetition", row("Go on", "4", thinking="wait, let me see once more. " * 30))
    assert found is not None
    assert "in message 1 (thinking)" in found
    assert "over max_share 0.3" in found


def test_max_share_decides() -> None:
    mixed = row("Go on", SONG + " " + "and so on and on we go. " * 8)
    assert reason("repetition", mixed, max_share=0.1)
    assert reason("repetition", mixed, max_share=0.9) is None


# ---------------------------------------------------------------------------------- think markers


def test_markers_that_pair_up_inside_a_text_are_kept() -> None:
    assert reason("think-markers", row("Hi", "It writes `<think>` and then `</think>`.")) is None


@pytest.mark.parametrize(
    ("answer", "thinking"),
    [
        ("<think>a</think>b", None), (" <think>a</think>b", None), ("a</think>b", None),
        ("b", "a</think>"), ("b", "<think>a"), ("b", "<think>a</think>"),
        ("x <think><think></think></think>", None), ("x <think>", None),
        ("x </think><think>", None),
    ],
)  # fmt: skip
def test_markers_left_in_a_row_are_dropped(answer: str, thinking: str | None) -> None:
    assert reason("think-markers", row("Hi", answer, thinking=thinking))


# --------------------------------------------------------------------------------- answer missing


@pytest.mark.parametrize("answer", [None, "", " \n\t", "...", "—", "。", '"!?"', "\u200b", "()"])
def test_a_row_without_an_answer_is_dropped(answer: str | None) -> None:
    assert reason("answer-missing", row("Which?", answer, thinking=answer and "because"))


@pytest.mark.parametrize("answer", ["4", "+", "是", "👍", "x", "€", "∞", "**a**"])
def test_a_short_answer_is_an_answer(answer: str) -> None:
    assert reason("answer-missing", row("Which?", answer)) is None


# ---------------------------------------------------------------------------------------- refusal

REFUSALS = [
    "As an AI language model, I don't have personal opinions.",
    "As a large language model trained by Acme, I cannot browse the internet.",
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, but I can’t help with that request.",
    "I am sorry, but as an AI language model, I am unable to provide medical advice.",
    "Sorry, I cannot fulfill this request.",
    "I apologize, but I'm not able to generate that kind of content.",
    "Unfortunately, I cannot access external websites.",
    "I cannot assist with this request.",
    "I can't help you with that.",
    "I'm just an AI and I don't have feelings.",
    "作为一个AI语言模型，我没有个人情感。",
    "作为人工智能助手，我无法提供医疗建议。",
    "很抱歉，我无法回答这个问题。",
    "对不起，我不能提供这方面的信息。",
    "抱歉，作為一個人工智慧助手，我無法協助您。",
    "我是一个人工智能，没有感情。",
    "我无法协助您完成此操作。",
    "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.",
    "Tut mir leid, ich kann diese Frage nicht beantworten.",
    "Als KI-Sprachmodell habe ich keine persönlichen Meinungen.",
    "Leider kann ich dir dabei nicht weiterhelfen.",
    "Ich bin nur eine KI und habe keine Gefühle.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "Lo siento, no puedo proporcionar esa información.",
    "Como modelo de lenguaje, no tengo opiniones personales.",
    "Como una inteligencia artificial, no puedo sentir.",
    "Soy un modelo de lenguaje y no tengo emociones.",
    "Je suis désolé, mais je ne peux pas vous aider avec cela.",
    "Désolé, je ne peux pas répondre à cette question.",
    "En tant que modèle de langage, je n'ai pas d'opinions.",
    "En tant qu'IA, je ne peux pas ressentir d'émotions.",
    "Je suis une IA, je n'ai pas de corps.",
    "申し訳ありませんが、そのご質問にはお答えできません。",
    "申し訳ございませんが、その情報を提供することはできません。",
    "すみませんが、お手伝いできません。",
    "AI言語モデルとして、私は個人的な意見を持っていません。",
    "私はAIなので、感情はありません。",
]
NO_REFUSALS = [
    "I'm sorry to hear that you are ill. Drink a lot of tea.",
    "I'm sorry, but I can't come to your party on Saturday.",
    "Sorry, I can't make it tonight. Could we meet on Friday instead?",
    "I can't help but admire how the poem ends.",
    "I cannot stress enough how important sleep is.",
    "Unfortunately, the recipe needs eggs.",
    "As an AI engineer, you should learn statistics.",
    "As an airline pilot, I fly every week.",
    "I am an artist and I don't sell my pictures.",
    'Chatbots often say "As an AI language model, I cannot do that."',
    "The phrase \"I'm sorry, but I can't assist with that\" is a stock refusal.",
    "很抱歉听到这个消息，希望你早日康复。",
    "对不起，我不能参加星期六的聚会。",
    "作为人工智能专业的学生，我每天写代码。",
    "我不能吃花生，请不要放。",
    "Leider kann ich am Samstag nicht kommen.",
    "Es tut mir leid, dass ich zu spät bin.",
    "Als Kind habe ich viel gelesen.",
    "Als Kinderarzt kann ich das bestätigen.",
    "Lo siento mucho por tu pérdida.",
    "Lo siento, no puedo ir a la fiesta.",
    "Como arquitecto, no tengo tiempo.",
    "Je suis désolé d'apprendre cela.",
    "Je suis désolé, je ne peux pas venir samedi.",
    "En tant que médecin, je conseille le repos.",
    "申し訳ありませんが、土曜日の会議には出席できません。",
    "すみませんが、駅はどこですか。",
    "AIとして最初に作られたプログラムは何ですか。",
    *PROMPTS,
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_stock_refusal_is_dropped(text: str) -> None:
    assert "begins like a refusal" in str(reason("refusal", row("Do it", text)))
    assert reason("refusal", row("Do it", f"\n**{text}** And more."))


def test_a_letter_of_apology_or_a_text_about_refusals_is_kept() -> None:
    wrong = {text: found for text in NO_REFUSALS if (found := reason("refusal", row("Do", text)))}
    assert wrong == {}


@QUICK
@given(refusal=st.sampled_from(REFUSALS), before=st.sampled_from(PROMPTS))
def test_a_refusal_further_on_or_in_a_question_is_kept(refusal: str, before: str) -> None:
    assert reason("refusal", row(refusal, f"{before} {refusal}")) is None


# --------------------------------------------------------------------------------------- language

RUSSIAN = "Столица Франции находится на берегу реки Сены, и в ней живут два миллиона человек."
ITALIAN = "La capitale della Francia si trova sulla Senna e ci vivono circa due milioni di persone."
ENGLISH = "The capital of France lies on the river Seine, and two million people live in it."


@QUICK
@given(prompt=st.sampled_from(PROMPTS), other=st.sampled_from([RUSSIAN, ITALIAN]))
def test_a_side_in_another_language_is_dropped(prompt: str, other: str) -> None:
    assert "answer in" in str(reason("language", row(prompt, other)))
    assert "question in" in str(reason("language", row(other, prompt)))
    assert "chain in" in str(reason("language", row(prompt, prompt, thinking=other)))


def test_any_chinese_is_chinese() -> None:
    chinese = row("请用三个短句回答，每句前面加上序号：早餐吃什么比较健康？", "今天天气很好。")
    for code in ("zh", "zh-cn", "zh_TW", "ZH", "yue"):
        assert reason("language", chinese, keep=[code]) is None
    assert "question in zh" in str(reason("language", chinese, keep=["en"]))


def test_code_quotations_and_short_texts_are_left_alone() -> None:
    fenced = f"```text\n{RUSSIAN}\n{RUSSIAN}\n```"
    for text in (
        f"Run this:\n{fenced}",
        CODE,
        f'Put into English: "{ITALIAN}"',
        "Grazie mille",
        "42",
    ):
        assert reason("language", row(text, text), keep=["en"]) is None, text


def test_min_characters_and_min_probability_decide() -> None:
    found = row(ENGLISH, ITALIAN)
    assert reason("language", found, keep=["en"])
    assert reason("language", found, keep=["en"], min_characters=200) is None
    assert reason("language", found, keep=["en"], min_probability=1.0) is None

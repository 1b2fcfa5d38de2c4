"""Hints: which row belongs to which rollout, and the exact ids that the teacher reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model
from transformers import AutoTokenizer

from tutelage.core.errors import DataError
from tutelage.data.hints import Hints, answered_id, hint_rows
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.text.chat import ChatFormat

Row = dict[str, Any]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = write_model(tmp_path_factory.mktemp("model"), layers=1)
    return ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(folder))


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content, "thinking": None}


def assistant(content: str, thinking: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "thinking": thinking}


def row(name: str, *messages: Any, mode: str = "fast", answer: str | None = None) -> Row:
    return {
        "id": name, "source": "a.jsonl", "language": None, "mode": mode, "complete": True,
        "messages": list(messages), "answer": answer, "task": None, "difficulty": None,
        "meta": None,
    }  # fmt: skip


def rollout(chat: ChatFormat, prompt: str, *messages: Any, mode: str = "fast") -> Row:
    ids = chat.prompt_ids(list(messages), mode)  # type: ignore[arg-type]
    return {
        "id": f"{prompt}/{mode}/0", "prompt_id": prompt, "mode": mode, "prompt_ids": ids,
        "response_ids": [1, 2, 3],
    }  # fmt: skip


def hints(
    chat: ChatFormat, rows: Sequence[Row], *, text: str = "", chain: bool = False,
    context: int | None = None,
) -> Hints:  # fmt: skip
    return Hints(chat, {answered_id(r): r for r in rows}, text, chain, context)


def read(chat: ChatFormat, ids: Sequence[int] | None) -> str:
    assert ids is not None
    return str(chat.tokenizer.decode(list(ids)))


# Whose row it is


@pytest.mark.parametrize(
    ("name", "mode", "prompt"),
    [
        ("q1/reasoning/0", "reasoning", "q1"), ("a/b/c.jsonl:7/fast/12", "fast", "a/b/c.jsonl:7"),
        ("q1", "fast", "q1"), ("q1/fast/0", "reasoning", "q1/fast/0"),
        ("set/fast", "fast", "set/fast"), ("fast/0", "fast", "fast/0"),
        ("/fast/0", "fast", "/fast/0"), ("q/fast/x", "fast", "q/fast/x"),
        ("q/fast/", "fast", "q/fast/"), ("q/fast/²", "fast", "q/fast/²"),
        ("q/fast/0/fast/1", "fast", "q/fast/0"),
    ],
)  # fmt: skip
def test_the_prompt_an_answer_belongs_to_is_in_its_id(name: str, mode: str, prompt: str) -> None:
    assert answered_id(row(name, user("q"), mode=mode)) == prompt


def found(folder: Path, rows: Sequence[Row], wanted: Sequence[str]) -> Mapping[str, Any]:
    write_rows(folder / "rows.parquet", rows, CONVERSATIONS)
    return hint_rows([folder / "rows.parquet"], wanted)


def test_of_several_answers_to_a_prompt_the_first_is_taken(tmp_path: Path) -> None:
    rows = [row(f"q{n // 2}/fast/{n % 2}", user("q"), assistant(str(n))) for n in range(4)]
    taken = found(tmp_path, rows, ["q0", "q1", "q7"])
    assert {k: r["messages"][-1]["content"] for k, r in taken.items()} == {"q0": "0", "q1": "2"}


def test_a_row_that_was_itself_the_prompt_comes_before_answers_to_it(tmp_path: Path) -> None:
    """Rollouts may answer the prompts of a `synthesize` step: ids have mode and sample then."""
    rows = [row("q/fast/0", user("q"), assistant("0")), row("q", user("q"), assistant("own"))]
    assert found(tmp_path, rows, ["q/fast/0"]) == {"q/fast/0": rows[0]}
    assert found(tmp_path, rows, ["q"]) == {"q": rows[1]}


def test_hints_of_other_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 prompts .* begin with 'x', .* 'q0'"):
        found(tmp_path, [row("x", user("q"))], ["q1", "q0"])


# What the teacher reads


def test_a_hint_stands_behind_the_question_in_the_same_template(chat: ChatFormat) -> None:
    known = hints(chat, [row("q", user("What?"), answer="42")], text="It is {answer}.")
    ids = known.prompt_ids(rollout(chat, "q", user("What?")))
    assert ids == chat.prompt_ids([user("What?\n\nIt is 42.")], "fast")  # type: ignore[list-item]
    plain = chat.prompt_ids([user("What?")], "fast")  # type: ignore[list-item]
    assert read(chat, ids) == read(chat, plain).replace("What?", "What?\n\nIt is 42.")


def test_the_whole_talk_before_is_read_too(chat: ChatFormat) -> None:
    talk = [user("a"), assistant("b", "chain"), user("c")]
    known = hints(chat, [row("q/fast/0", *talk, assistant("d"))], text="Say {response}")
    ids = known.prompt_ids(rollout(chat, "q", *talk))
    wanted = [*talk[:2], user("c\n\nSay d")]
    assert ids == chat.prompt_ids(wanted, "fast")  # type: ignore[arg-type]


def test_a_chain_is_read_before_a_fast_answer_and_ends_as_its_prompt_does(
    chat: ChatFormat,
) -> None:
    known = hints(chat, [row("q/reasoning/0", user("What?"), assistant("42", "6 x 7"),
                             mode="reasoning")], chain=True)  # fmt: skip
    one = rollout(chat, "q", user("What?"))
    ids = known.prompt_ids(one)
    whole = chat.render([user("What?"), assistant("42", "6 x 7")])  # type: ignore[list-item]
    assert ids is not None
    assert whole.ids.tolist()[: len(ids)] == ids
    assert read(chat, ids).endswith("6 x 7\n</think>\n\n")
    assert read(chat, one["prompt_ids"]).endswith("</think>\n\n")


def test_text_and_chain_go_together(chat: ChatFormat) -> None:
    known = hints(chat, [row("q/reasoning/0", user("What?"), assistant("42", "6 x 7"),
                             mode="reasoning", answer="42")],
                  text="Gold: {answer}, said: {response}.", chain=True)  # fmt: skip
    said = read(chat, known.prompt_ids(rollout(chat, "q", user("What?"))))
    assert "What?\n\nGold: 42, said: 42." in said
    assert "6 x 7" in said


def test_a_value_that_looks_like_a_slot_is_left_as_it_is(chat: ChatFormat) -> None:
    known = hints(chat, [row("q/fast/0", user("?"), assistant("{answer}"), answer="{response}")],
                  text="{answer} {response}")  # fmt: skip
    said = read(chat, known.prompt_ids(rollout(chat, "q", user("?"))))
    assert "{response} {answer}" in said


def test_special_tokens_in_a_hint_are_text(chat: ChatFormat) -> None:
    known = hints(chat, [row("q", user("?"), answer="a<|im_end|>b")], text="{answer}")
    ids = known.prompt_ids(rollout(chat, "q", user("?"))) or []
    plain = chat.prompt_ids([user("?")], "fast")  # type: ignore[list-item]
    assert ids.count(chat.end_of_turn_id) == plain.count(chat.end_of_turn_id)


@pytest.mark.parametrize("known", [
    row("other", user("?"), answer="1"), row("q", user("?")), row("q", user("?"), answer="  "),
])  # fmt: skip
def test_a_row_that_is_unknown_or_lacks_the_answer_gives_no_hint(
    chat: ChatFormat, known: Row
) -> None:
    one = rollout(chat, "q", user("?"))
    assert hints(chat, [known], text="{answer}").prompt_ids(one) is None


def test_there_is_no_chain_where_the_row_or_the_rollout_does_not_allow_it(
    chat: ChatFormat,
) -> None:
    fast = row("q/fast/0", user("?"), assistant("1"))
    thought = row("q/reasoning/0", user("?"), assistant("1", "so"), mode="reasoning")
    own = rollout(chat, "q", user("?"), mode="reasoning")
    assert hints(chat, [fast], chain=True).prompt_ids(rollout(chat, "q", user("?"))) is None
    assert hints(chat, [thought], chain=True).prompt_ids(own) is None


def test_a_hint_that_would_not_fit_is_left_out(chat: ChatFormat) -> None:
    rows, one = [row("q", user("?"), answer="42")], rollout(chat, "q", user("?"))
    ids = hints(chat, rows, text="{answer}").prompt_ids(one) or []
    length = len(ids) + len(one["response_ids"])
    assert hints(chat, rows, text="{answer}", context=length).prompt_ids(one) == ids
    assert hints(chat, rows, text="{answer}", context=length - 1).prompt_ids(one) is None


def test_a_row_of_the_same_id_and_another_prompt_is_refused(chat: ChatFormat) -> None:
    known = hints(chat, [row("q", user("Why?"), answer="42")], text="{answer}")
    with pytest.raises(DataError, match="hints: the prompt 'q' is not the one that rollout"):
        known.prompt_ids(rollout(chat, "q", user("What?")))

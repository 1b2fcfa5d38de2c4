"""What a row means: a conversation, a prompt, or a reason why it is neither."""

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.core.errors import DataError
from tutelage.data.rows import conversation
from tutelage.recipe.curation import Columns, DataSource
from tutelage.records import CONVERSATIONS, read_rows, write_rows


def understood(row: dict[str, Any], **columns: str) -> dict[str, Any]:
    source = DataSource(source="a.jsonl", columns=Columns(**columns), language="de")
    return conversation(row, source, place="a.jsonl:7", name="a.jsonl")


def message(role: str, content: str, thinking: str | None = None) -> dict[str, Any]:
    return {"role": role, "content": content, "thinking": thinking}


def test_a_prompt_and_its_response_become_a_conversation() -> None:
    found = understood({"system": "Be kind.", "question": "2+2?", "output": "4", "answer": 4})
    assert found["messages"] == [
        message("system", "Be kind."), message("user", "2+2?"), message("assistant", "4"),
    ]  # fmt: skip
    assert (found["mode"], found["answer"], found["id"]) == ("fast", "4", "a.jsonl:7")
    assert (found["source"], found["language"], found["complete"]) == ("a.jsonl", "de", True)


def test_a_row_without_an_answer_is_a_prompt() -> None:
    assert understood({"prompt": "Hi"})["messages"] == [message("user", "Hi")]


def test_a_chain_makes_the_row_one_of_reasoning_however_it_is_given() -> None:
    rows = [
        {"prompt": "2+2?", "response": "4", "thinking": "two and two"},
        {"prompt": "2+2?", "response": "<think>two and two</think>4"},
        {"messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
        ]},
        {"conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "gpt", "value": "<think>two and two</think>4"},
        ]},
    ]  # fmt: skip
    for row in rows:
        found = understood(row)
        assert found["mode"] == "reasoning"
        assert found["messages"][-1] == message("assistant", "4", "two and two")


def test_a_chain_of_an_earlier_turn_does_not_make_the_row_one_of_reasoning() -> None:
    turns = [("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "d")]
    found = understood({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert found["mode"] == "fast"
    assert found["messages"][1]["thinking"] == "x"


def test_mapped_columns_win_over_the_usual_names() -> None:
    found = understood({"prompt": "no", "q": "yes", "key": 12}, prompt="q", id="key")
    assert found["messages"] == [message("user", "yes")]
    assert found["id"] == "12"


def test_a_column_that_is_mapped_to_one_thing_is_not_taken_for_another() -> None:
    found = understood({"prompt": "Hi", "output": "42"}, answer="output")
    assert found["answer"] == "42"
    assert len(found["messages"]) == 1


def test_what_is_not_understood_is_kept_as_meta() -> None:
    found = understood({"prompt": "Hi", "level": 3, "tags": ["a"], "task": "sum"})
    assert json.loads(found["meta"]) == {"level": 3, "tags": ["a"]}
    assert found["task"] == "sum"
    assert understood({"prompt": "Hi"})["meta"] is None


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"text": "x"}, {}, "has neither messages nor a prompt"),
        ({"prompt": "  \n"}, {}, "has neither messages nor a prompt"),
        ({"prompt": None}, {}, "has neither messages nor a prompt"),
        ({"prompt": "x"}, {"prompt": "question"}, "has no column 'question' (mapped to prompt)"),
        ({"prompt": "x"}, {"answer": "gold"}, "has no column 'gold' (mapped to answer)"),
        ({"prompt": ["x"]}, {}, "has a prompt that is not text"),
        ({"prompt": "x", "response": {"a": 1}}, {}, "has a response that is not text"),
        ({"prompt": "x", "response": " "}, {}, "has an empty answer"),
        ({"messages": []}, {}, "has no user message"),
        ({"messages": ["x"]}, {}, "has a message that is not an object"),
        (
            {"messages": [{"role": "tool", "content": "x"}]}, {},
            "has a message with the role 'tool'",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, {}, "whose content is not text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, {}, "has no user message"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, {},
         "ends with a system message"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, {},
         "has an empty answer"),
        ({"prompt": "x", "response": "<think>only this</think>"}, {}, "has an empty answer"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_told_why(
    row: dict[str, Any], columns: dict[str, str], reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        understood(row, **columns)
    assert reason in str(caught.value)
    assert "a.jsonl" not in str(caught.value)  # the caller puts the place in front


def test_what_is_understood_is_what_comes_back_from_disk(tmp_path: Path) -> None:
    rows = [
        understood({"prompt": "a\0b", "response": "é", "id": f"r{i}", "n": i}) for i in range(3)
    ]
    assert write_rows(tmp_path / "rows.parquet", rows, CONVERSATIONS) == 3
    assert list(read_rows([tmp_path / "rows.parquet"])) == rows

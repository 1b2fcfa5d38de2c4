"""What a judge is asked, and the rating read from its reply."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evals.judge import LEAST, MOST, judge_messages, parse_rating


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 4", 4),
        ("It is right.\nRating: 5", 5),
        ("**Rating:** 4/5", 4),
        ("### Rating\n\n2", 2),
        ("Rating (1-5): 2", 2),
        ("The rating of this answer is 3 out of 5.", 3),
        ("Score = 1", 1),
        ("Rating：４", 4),  # full width
        ("rating: [5]", 5),
        ("Rating: 4.0", 4),
        ("Rating: 4.", 4),
        (" 3.\n", 3),
        ("5/5", 5),
    ],
)
def test_a_rating_is_read_however_it_is_dressed(reply: str, rating: int) -> None:
    assert parse_rating(reply) == rating


@pytest.mark.parametrize(
    "reply",
    ["", "I like it.", "Rating: five", "Rating: 0", "Rating: 6", "Rating: 45", "Rating: 4.5",
     "Rating: -3", "-3", "8/10", "Rating: 4 out of 10", "Rating: 1 to 5", "Rating: 1-5",
     "Rating: 45 to 50", "Rating: 3 or 4", "operating: 4", "There are 4 apples.",
     "My rating.\n1. The answer is short."],
)  # fmt: skip
def test_what_is_no_whole_number_from_one_to_five_is_no_rating(reply: str) -> None:
    assert parse_rating(reply) is None


def test_a_rating_said_twice_is_one_and_two_that_differ_are_none() -> None:
    assert parse_rating("My rating is 4.\n\nRating: 4") == 4
    assert parse_rating("Rating: 2 at first sight.\nRating: 4") is None
    assert parse_rating("Rating: 4, as 4/5.\nRating: 9") is None
    # what SmolLM2-135M says to this question, cut off at any point
    assert parse_rating("Rating: 1\n\nRating: 2\n\nRating: 3\n\nRating:") is None


@given(st.text(max_size=60))
def test_no_reply_breaks_the_reader(reply: str) -> None:
    assert parse_rating(reply) in (None, *range(LEAST, MOST + 1))


@given(st.text(alphabet="ab .\n*", max_size=60), st.integers(LEAST, MOST))
def test_a_rating_after_any_words_is_read(words: str, rating: int) -> None:
    assert parse_rating(f"{words}\nRating: {rating}") == rating


def test_the_judge_is_told_rubric_task_answer_and_the_form_of_a_rating() -> None:
    (message,) = judge_messages("It is {kind}.", [user("Say hi to {name}.")], "Hi {name}!")
    assert message["role"] == "user"
    told = message["content"]
    assert told.index("It is {kind}.") < told.index("Say hi to {name}.") < told.index("Hi {name}!")
    assert told.endswith("Rating: <number>")
    assert parse_rating(told) is None  # the question itself, echoed, is no rating


def test_earlier_turns_are_shown_with_their_roles() -> None:
    prompt = [user("One?"), {"role": "assistant", "content": "1."}, user("Two?")]
    told = judge_messages("r", prompt, "2.")[0]["content"]
    assert "[user]\nOne?\n\n[assistant]\n1.\n\n[user]\nTwo?\n" in told


@given(st.text(alphabet="=\n A", max_size=40), st.text(alphabet="=\n A", max_size=40))
def test_no_answer_closes_its_own_part(task: str, answer: str) -> None:
    told = judge_messages("r", [user(task)], answer)[0]["content"]
    rule = told.split(" TASK\n")[0].rsplit("\n", 1)[1]
    assert set(rule) == {"="}
    assert rule not in task
    assert rule not in answer
    assert f"{rule} ANSWER\n{answer}\n{rule} END" in told

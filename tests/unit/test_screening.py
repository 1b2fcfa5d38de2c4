"""What empty, looping and Delta-IFD mean, and which settings of a `screen` step cannot be."""

from typing import Any

import numpy as np
import pytest

from tutelage.core.artifact import Artifact
from tutelage.core.errors import RecipeError
from tutelage.data.difficulty import alone_openings, mean_nll
from tutelage.data.screening import Loop, delta_ifd, find_loop, is_empty, said_ids, student_of
from tutelage.recipe.load import parse


def loop(ids: list[int], **settings: Any) -> Loop | None:
    return find_loop(ids, **{"period": 8, "repeats": 4, "tokens": 12, "same": 1.0} | settings)


TALK = list(range(100, 140))
"""No token twice."""


def test_a_tail_that_repeats_is_a_loop_and_its_length_is_told() -> None:
    assert loop(TALK + [1, 2, 3] * 4) == Loop(3, 12)
    assert loop(TALK + [1, 2, 3] * 9 + [1, 2]) == Loop(3, 29)  # the last time was cut off
    assert loop([7] * 12) == Loop(1, 12)


def test_the_shortest_period_is_told() -> None:
    assert loop([5, 6] * 20) == Loop(2, 40)


def test_too_few_times_or_too_few_tokens_are_no_loop() -> None:
    assert loop(TALK + [1, 2, 3, 4] * 3) is None
    assert loop(TALK + [1, 2, 3, 4] * 3, repeats=3) == Loop(4, 12)
    assert loop(TALK + [9] * 11) is None
    assert loop(TALK + [9] * 12) == Loop(1, 12)


def test_a_period_longer_than_asked_for_is_no_loop() -> None:
    turn = list(range(9))
    assert loop(turn * 6) is None
    assert loop(turn * 6, period=9) == Loop(9, 54)


def test_a_loop_that_was_left_again_is_none() -> None:
    assert loop([1, 2, 3] * 9 + TALK[:3]) is None


def test_a_sentence_whose_number_rises_is_a_loop_where_some_tokens_may_differ() -> None:
    counted = [token for turn in range(6) for token in (50 + turn, 1, 2, 3, 4, 5, 6, 7)]
    assert loop(TALK + counted) is None
    found = loop(TALK + counted, same=0.85)
    assert found is not None
    assert found.period == 8
    pairs = [token for turn in range(20) for token in (50 + turn, 1)]  # as `1, 2, 3, 4,`
    assert loop(TALK + pairs, same=0.85) is None


@pytest.mark.parametrize("ids", [[], [1], [1, 1], TALK])
def test_an_answer_too_short_or_without_repetition_is_no_loop(ids: list[int]) -> None:
    assert loop(ids, same=0.85) is None


def rollout(text: str, ids: list[int], finish: str = "stop") -> dict[str, Any]:
    return {"text": text, "response_ids": ids, "finish_reason": finish}


def test_the_token_that_ended_an_answer_is_not_said() -> None:
    assert said_ids(rollout("a<|im_end|>", [4, 2])) == [4]
    assert said_ids(rollout("a b", [4, 2], "length")) == [4, 2]


@pytest.mark.parametrize("empty", [
    rollout("", [], "length"), rollout("<|im_end|>", [2]), rollout("\n \n</s>", [3, 2]),
    rollout("  \n", [3], "length"), rollout("", [2]),
])  # fmt: skip
def test_an_answer_that_says_nothing_is_empty(empty: dict[str, Any]) -> None:
    assert is_empty(empty)


@pytest.mark.parametrize("said", [
    rollout("7<|im_end|>", [4, 2]), rollout("<b>", [4], "length"), rollout("x", [4], "length"),
])  # fmt: skip
def test_an_answer_of_one_token_is_not_empty(said: dict[str, Any]) -> None:
    assert not is_empty(said)


def test_delta_ifd_is_the_difference_of_two_ratios() -> None:
    found = delta_ifd([1.0, 3.0, 1.0, np.nan], [2.0, 3.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0],
                      [4.0, 2.0, 2.0, 2.0])  # fmt: skip
    np.testing.assert_allclose(found, [0.25, 0.5, np.nan, np.nan])


def test_a_mean_nll_is_not_negative() -> None:
    assert mean_nll(np.array([-1.0, -2.0], np.float32)) == 1.5
    assert mean_nll(np.array([1e-7], np.float32)) == 0


def test_an_answer_alone_stands_behind_an_empty_user_turn() -> None:
    class Chat:
        """Says what it was asked for."""

        def prompt_ids(self, messages: Any, mode: str) -> list[Any]:
            return [messages, mode]

    openings = alone_openings(Chat())  # type: ignore[arg-type]
    empty = [{"role": "user", "content": ""}]
    assert openings == {"fast": [empty, "fast"], "reasoning": [empty, "reasoning"]}


def test_the_student_is_known_through_a_screen() -> None:
    written = {"inputs": {"model": {"fingerprint": "s"}}, "summary": {}}
    screened = {"inputs": {"rollouts": {"fingerprint": "r"}}, "summary": {"student": "s"}}
    for manifest in (written, screened):
        assert student_of(Artifact(None, manifest)) == "s"  # type: ignore[arg-type]


# Settings that cannot be


DELTA = {"delta_ifd": [0.0, 0.8], "teacher": "m", "student": "m"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**DELTA, "delta_ifd": [0.0]}, "delta_ifd is [least, most]"),
        ({**DELTA, "delta_ifd": [0.8, 0.0]}, "delta_ifd is [least, most]"),
        ({"delta_ifd": [0.0, 0.8], "student": "m"}, "delta_ifd and teacher go together"),
        ({"teacher": "m"}, "delta_ifd and teacher go together"),
        ({"delta_ifd": [0.0, 0.8], "teacher": "m"}, "need student"),
        ({"verdict": "correct"}, "verdict = 'correct' needs a verifier"),
        ({"verifier": "numeric"}, "verifier and prompts go together"),
        ({"prompts": "rows"}, "verifier and prompts go together"),
        ({"verifier": "numeric", "prompts": "rows"}, "need student"),
        ({"loop_repeats": 1}, "greater than or equal to 2"),
        ({"loop_same": 1.5}, "less than or equal to 1"),
        ({"looping": "maybe"}, "'keep' or 'drop'"),
        ({"loping": "drop"}, "unknown key; did you mean 'looping'?"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict[str, Any], said: str) -> None:
    raw = {
        "name": "r", "models": {"m": {"source": "./m"}},
        "steps": {"screened": {"stage": "screen", "rollouts": "r", **settings}},
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        parse(raw, "recipe.toml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("recipe.toml: steps.screened")

"""Identities: one text form or an error, the same in every process."""

import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.core.fingerprint import canonical_json, differences, fingerprint

VALUE = {"b": [1, 1.0, True, None, "é"], "a": {"x": 1e-05}}
PINNED = "9d9c8f30e706a62050aca728bd008d56d0789e116c3ad73204a5e8d3595cce78"


def test_the_canonical_text_and_its_hash_are_pinned() -> None:
    assert canonical_json(VALUE) == '{"a":{"x":1e-05},"b":[1,1.0,true,null,"é"]}'
    assert fingerprint(VALUE) == PINNED


def test_another_process_with_another_hash_seed_agrees() -> None:
    script = (
        "from tutelage.core.fingerprint import fingerprint\n"
        'print(fingerprint({"a": {"x": 1e-05}, "b": (1, 1.0, True, None, "\\u00e9")}))'
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONHASHSEED": "77"}, capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == PINNED


@pytest.mark.parametrize(
    ("value", "error", "place"),
    [
        ({"a": {1, 2}}, TypeError, "$.a is a set"),
        ({"a": [pathlib.PurePosixPath("x")]}, TypeError, "$.a[0] is a PurePosixPath"),
        ({"a": float("nan")}, ValueError, "$.a is nan"),
        ({"a": {"b": float("-inf")}}, ValueError, "$.a.b is -inf"),
        ({"a": {3: "x"}}, TypeError, "$.a has the key 3"),
        ({"a": b"x"}, TypeError, "$.a is a bytes"),
        ({"a": object()}, TypeError, "$.a is a object"),
    ],
)
def test_what_has_no_single_text_form_raises_and_names_its_place(
    value: Any, error: type[Exception], place: str
) -> None:
    with pytest.raises(error, match=re.escape(place)):
        fingerprint(value)


def test_the_order_of_keys_does_not_count_but_the_order_of_a_list_does() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_values_of_different_types_have_different_identities() -> None:
    assert len({fingerprint(value) for value in (1, 1.0, True, "1", None, [1])}) == 6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON, JSON)
def test_a_difference_is_told_exactly_when_identities_differ(left: Any, right: Any) -> None:
    assert differences(left, left) == []
    assert bool(differences(left, right)) == (fingerprint(left) != fingerprint(right))


def test_differences_name_fields_not_hashes() -> None:
    old = {"lr": 1e-05, "data": [{"rows": 3}, {"rows": 4}], "same": 1, "gone": "x"}
    new = {"lr": 2e-05, "data": [{"rows": 3}, {"rows": 5}], "same": 1}
    assert differences(old, new) == [
        "data[1].rows: 4 -> 5",
        'gone: "x" -> absent',
        "lr: 1e-05 -> 2e-05",
    ]


def test_a_long_value_is_shortened_in_a_difference() -> None:
    (line,) = differences({"text": "a" * 500}, {"text": "b"})
    assert len(line) < 100
    assert line.endswith('... -> "b"')

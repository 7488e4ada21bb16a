"""Objects of a schema are closed where that leaves every declared member possible."""

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.closed_schemas import closed

A, B = {"type": "string"}, {"type": "integer"}


def test_objects_are_closed_at_every_depth() -> None:
    inner = {"type": "object", "properties": {"a": A}}
    schema = {
        "$defs": {"x": inner},
        "properties": {"list": {"items": inner}, "any": {"anyOf": [inner, {"$ref": "#/$defs/x"}]}},
        "required": ["list"],
    }
    shut = inner | {"additionalProperties": False}
    assert closed(schema) == {
        "$defs": {"x": shut},
        "properties": {"list": {"items": shut}, "any": {"anyOf": [shut, {"$ref": "#/$defs/x"}]}},
        "required": ["list"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object"},
        {"properties": {"a": A}, "additionalProperties": True},
        {"properties": {"a": A}, "additionalProperties": B},
        {"properties": {"a": A}, "required": ["a", "b"]},
        {"allOf": [{"properties": {"a": A}}, {"properties": {"b": B}}]},
        {"properties": {"a": A}, "anyOf": [{"properties": {"b": B}}]},
        {"properties": {"a": A}, "$ref": "#/$defs/x", "$defs": {"x": {"properties": {"b": B}}}},
        {"properties": {"a": A}, "patternProperties": {"^b": B}},
        {"enum": [{"properties": {"a": 1}}]},
        {"properties": "nonsense"},
    ],
)
def test_what_is_left_as_it_is(schema: Any) -> None:
    assert closed(schema) == schema


NAMES = st.sampled_from("abc")
SCHEMAS = st.recursive(
    st.sampled_from([A, B, True]),
    lambda inner: (
        st.fixed_dictionaries(
            {"properties": st.dictionaries(NAMES, inner, max_size=2)},
            optional={
                "required": st.lists(NAMES, max_size=2),
                "anyOf": st.lists(inner, min_size=1),
            },
        )
        | st.fixed_dictionaries({"items": inner})
    ),
    max_leaves=6,
)
VALUES = st.recursive(
    st.integers() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@given(schema=SCHEMAS, value=VALUES)
def test_nothing_becomes_valid_that_was_not(schema: Any, value: Any) -> None:
    if jsonschema.Draft202012Validator(closed(schema)).is_valid(value):
        assert jsonschema.Draft202012Validator(schema).is_valid(value)

"""Schemas for a model to write by: an object has the members that are declared, and no others.

JSON Schema lets an object have any members beyond its `properties`. A small model that may invent
some does so until its tokens are used up, and the schemas of pydantic rarely forbid it. What is
written without them satisfies the same schema. `additionalProperties` that is given stays as it is.
"""

from collections.abc import Iterator
from typing import Any

# Together these judge one object: one of them closed would forbid what another one declares.
JOINING = ("allOf", "not", "if", "dependentSchemas", "unevaluatedProperties")
JOINING_BESIDE_PROPERTIES = ("$ref", "$dynamicRef", "anyOf", "oneOf", "patternProperties")
ONE_SCHEMA = ("items", "additionalProperties", "contains")
SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "prefixItems")


def closed(schema: Any) -> Any:
    """The schema with its objects closed; as it is where its parts cannot be told apart.

    Raises RecursionError for one that is nested too deeply.
    """
    return schema if any(_joins(node) for node in _objects(schema)) else _close(schema)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in it, be it a schema or not."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


def _joins(node: dict[str, Any]) -> bool:
    return any(key in node for key in JOINING) or (
        "properties" in node and any(key in node for key in JOINING_BESIDE_PROPERTIES)
    )


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in ONE_SCHEMA:
        if key in made:
            made[key] = _close(made[key])
    for key in SCHEMAS_BY_NAME:
        if isinstance(made.get(key), dict):
            made[key] = {name: _close(inner) for name, inner in made[key].items()}
    for key in LISTS_OF_SCHEMAS:
        if isinstance(made.get(key), list):
            made[key] = [_close(inner) for inner in made[key]]
    declared, required = made.get("properties"), made.get("required", [])
    if isinstance(declared, dict) and isinstance(required, list) and set(required) <= set(declared):
        made.setdefault("additionalProperties", False)
    return made

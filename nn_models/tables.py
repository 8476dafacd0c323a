"""Tables: a Spec's fields as text for people."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from nn_models.errors import UserError, did_you_mean
from nn_models.zoo import MODELS

TYPE_WORDS = {
    "integer": "int",
    "number": "float",
    "boolean": "true | false",
    "string": "text",
    "object": "section",
    "null": "none",
}

BOUND_SIGNS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def summaries() -> dict[str, str]:
    """One line on each kind of model."""
    return {kind: (spec.__doc__ or "").splitlines()[0] for kind, spec in MODELS.items()}


class FieldRow(NamedTuple):
    """One field of a Spec as text for people; `default` is as YAML writes it, or "required"."""

    name: str
    type: str
    default: str
    description: str


def field_table(kind: str) -> list[FieldRow]:
    """The fields that a model of this kind takes, but `kind` itself.

    Raises UserError where there is no such kind.
    """
    if kind not in MODELS:
        raise UserError(kind, "unknown kind of model", did_you_mean(kind, MODELS))
    schema = MODELS[kind].model_json_schema()
    return [
        FieldRow(
            name,
            _type_text(field),
            json.dumps(field["default"]).strip('"') if "default" in field else "required",
            field.get("description", ""),
        )
        for name, field in schema["properties"].items()
        if name != "kind"
    ]


def _type_text(schema: Mapping[str, Any]) -> str:
    """A JSON schema's type in words, such as `list of int > 0` or `max | average`."""
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(map(_type_text, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_type_text(schema['items'])}"
    bounds = ", ".join(f"{sign} {schema[bound]}" for bound, sign in BOUND_SIGNS.items() if bound in schema)
    word = TYPE_WORDS.get(schema.get("type", "anything"), "anything")
    return f"{word} {bounds}".strip()

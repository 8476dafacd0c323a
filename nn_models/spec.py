"""Spec: a frozen, validated description, and how what does not fit it is told."""

import copy
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from nn_models.errors import Problem, ProblemKind, UserError, did_you_mean

T = TypeVar("T")
SpecT = TypeVar("SpecT", bound="Spec")


class Spec(BaseModel):
    """Base of every description: immutable, no unknown fields, defaults validated, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_pydantic_would_misread(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for field, value in data.items():
                if field not in cls.model_fields:  # pydantic would not suggest the right name
                    hint = did_you_mean(str(field), cls.model_fields)
                    raise invalid("unknown field", hint, field=str(field), kind="unknown field")
                items = value if isinstance(value, (list, tuple)) else [value]
                misread = [item for item in items if isinstance(item, bool)]
                if misread and not _takes_bool(cls.model_fields[field].annotation):
                    # pydantic would take `epochs: true` as 1
                    raise invalid(f"must not be {str(misread[0]).lower()}", field=str(field))
        return data

    def model_post_init(self, context: Any) -> None:
        """Count `kind` as set, so that a dump without defaults still says which kind it is."""
        if "kind" in type(self).model_fields:
            self.model_fields_set.add("kind")


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(inner) for inner in get_args(annotation))


def invalid(
    message: str, fix: str | None = None, *, field: str = "", kind: ProblemKind | None = None
) -> PydanticCustomError:
    """What a validator raises, for `validate` to tell the user.

    `field` is the dotted path of what is wrong within what is being validated; empty for that itself.
    """
    return PydanticCustomError(
        "manta_field",
        "{text}",
        {"text": f"{message}; {fix}" if fix else message, "field": field, "message": message, "fix": fix, "kind": kind},
    )


def validate(kind: type[T] | Any, data: Any, *, prefix: str = "") -> T:
    """`data` as a `kind` (a Spec class or a union of them).

    Raises UserError with all problems: the dotted path of each, what is wrong there and how to mend it.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise UserError.of(_explain(problem, data, prefix) for problem in error.errors()) from None


def override(spec: SpecT, changes: Mapping[str, Any]) -> SpecT:
    """A copy of `spec` with the values at the dotted paths replaced, validated anew.

    A value may be a whole section: `{"model": {"kind": "mlp"}}`. Raises UserError as `validate` does.
    """
    data = _plain(spec)
    for path, value in changes.items():
        *sections, field = path.split(".")
        place: dict[str, Any] = data
        here: Any = spec
        for depth, section in enumerate(sections, start=1):
            here = getattr(here, section) if section in getattr(type(here), "model_fields", {}) else None
            if place.get(section) is None:  # left at its default: go on from there
                place[section] = {} if here is None else _plain(here)
            place = place[section]
            if not isinstance(place, dict):
                value_there = ".".join(sections[:depth])
                raise UserError(
                    path, f"{value_there} is a value, not a section", "set it as a whole", kind="not a section"
                )
        place[field] = _plain(value)
    return validate(type(spec), data)


def _plain(value: Any) -> Any:
    """A Spec as the mapping it was made from; anything else as a copy, for later changes to go into."""
    return value.model_dump(mode="python", exclude_unset=True) if isinstance(value, Spec) else copy.deepcopy(value)


def short(value: Any) -> str:
    """The value as Python writes it, but of a long or deep one only the beginning."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 20
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxlevel = 4


_SHORT = _Short()


def _explain(problem: Any, data: Any, prefix: str) -> Problem:
    """One of pydantic's problems in our words."""
    context = problem.get("ctx") or {}
    path = _without_tags(problem["loc"], data)
    kind, value, message = problem["type"], problem["input"], problem["msg"]
    if kind == "manta_field":
        path += filter(None, [context["field"]])
        return Problem(_dotted(prefix, path), context["message"], context["fix"], context["kind"])
    if kind == "missing":
        return Problem(_dotted(prefix, path), "missing", "it has no default, so set it")
    if kind == "union_tag_not_found":
        return Problem(_dotted(prefix, [*path, "kind"]), "missing", "say which kind it is")
    if kind == "union_tag_invalid":
        known = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
        message = f"unknown kind {short(context['tag'])}"
        hint = did_you_mean(str(context["tag"]), known)
        return Problem(_dotted(prefix, [*path, "kind"]), message, hint, "unknown kind")
    if kind == "value_error":
        return Problem(_dotted(prefix, path), str(context["error"]))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be a section of fields"
    if kind in ("list_type", "tuple_type"):
        message = "must be a list"
    message = message.replace("Input should be", "must be")
    return Problem(_dotted(prefix, path), f"{message[0].lower()}{message[1:]}, not {short(value)}")


def _without_tags(location: tuple[int | str, ...], data: Any) -> list[str]:
    """pydantic puts a union's tag into the path (model.cnn.dropout); users write model.dropout."""
    path: list[str] = []
    here = data
    for step in location:
        value_here = here if isinstance(here, Mapping) else {}
        if value_here.get("kind") == step and step not in value_here:
            continue
        path.append(str(step))
        if isinstance(here, Mapping):
            here = here.get(step)
        elif isinstance(here, (list, tuple)) and isinstance(step, int) and step < len(here):
            here = here[step]
        else:
            here = None
    return path


def _dotted(prefix: str, path: list[str]) -> str:
    return ".".join([prefix, *path] if prefix else path) or "recipe"

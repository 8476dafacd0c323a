"""Specs: what is refused and in which words, and override()."""

from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, ValidationError, model_validator

from nn_models.errors import UserError, did_you_mean
from nn_models.spec import Spec, invalid, override, validate


class Dense(Spec):
    kind: Literal["dense"] = "dense"
    hidden: tuple[PositiveInt, ...] = (8,)
    dropout: float = Field(0.0, ge=0, lt=1)
    norm: bool = False


class Other(Spec):
    kind: Literal["other"] = "other"
    width: PositiveInt
    arguments: dict[str, Any] = Field({})


AnyNet = Annotated[Dense | Other, Field(discriminator="kind")]


class Train(Spec):
    epochs: PositiveInt = 3
    lr: float = 0.1
    clip: float | None = None


class Plan(Spec):
    net: AnyNet = Dense(hidden=(5,), dropout=0.5)
    train: Train = Train()
    sweep: Train | None = None


def refusal(kind, data, prefix=""):
    with pytest.raises(UserError) as caught:
        validate(kind, data, prefix=prefix)
    return str(caught.value)


def test_each_problem_has_its_fields():
    with pytest.raises(UserError) as caught:
        validate(Plan, {"trian": {}, "net": {"kind": "dens"}})
    (field,) = caught.value.problems
    assert field == ("trian", "unknown field", "did you mean train?", "unknown field", ())
    with pytest.raises(UserError) as caught:
        validate(Plan, {"net": {"kind": "dens"}, "train": {"epochs": 0, "lr": True}}, prefix="plan")
    kind, lr = caught.value.problems
    assert kind == ("plan.net.kind", "unknown kind 'dens'", "did you mean dense?", "unknown kind", ())
    assert lr == ("plan.train.lr", "must not be true", None, None, ())
    with pytest.raises(UserError) as caught:
        override(Plan(), {"train.lr.more": 1})
    assert caught.value.problems == (
        ("train.lr.more", "train.lr is a value, not a section", "set it as a whole", "not a section", ()),
    )


def test_a_validators_problem_has_its_fields():
    class Even(Spec):
        size: int

        @model_validator(mode="after")
        def _even(self) -> "Even":
            if self.size < 0:
                raise ValueError("is less than nothing; who would want that")
            if self.size % 2:
                raise invalid("is odd", f"set {self.size + 1}", field="size" if self.size > 1 else "")
            return self

    for size, expected in [
        (3, ("even.size", "is odd", "set 4")),
        (1, ("even", "is odd", "set 2")),
        (-1, ("even", "is less than nothing; who would want that", None)),  # text is not taken apart
    ]:
        with pytest.raises(UserError) as caught:
            validate(Even, {"size": size}, prefix="even")
        assert (caught.value.path, caught.value.message, caught.value.fix) == expected
    with pytest.raises(ValidationError, match="is odd; set 4"):  # who makes one by hand reads all
        Even(size=3)


def override_refusal(spec, changes):
    with pytest.raises(UserError) as caught:
        override(spec, changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"net": {"kind": "dense", "dropoutt": 0.1}}, "net.dropoutt: unknown field; did you mean dropout?"),
        ({"trian": {}}, "trian: unknown field; did you mean train?"),
        ({"zzz": 1}, "zzz: unknown field; known: net, sweep, train"),
        ({"train": {"epochs": "many"}}, "train.epochs: "),
        ({"train": {"epochs": 1.5}}, "train.epochs: "),
        ({"train": {"epochs": None}}, "train.epochs: must be a valid integer, not None"),
        ({"train": {"epochs": 0}}, "train.epochs: must be greater than 0, not 0"),
        ({"train": {"epochs": True}}, "train.epochs: must not be true"),
        ({"train": {"clip": False}}, "train.clip: must not be false"),
        ({"train": True}, "train: must not be true"),
        ({"net": {"kind": "dense", "hidden": [4, True]}}, "net.hidden: must not be true"),
        ({"net": {"kind": "dense", "hidden": 4}}, "net.hidden: must be a list, not 4"),
        ({"net": {"kind": "dense", "hidden": [4, -1]}}, "net.hidden.1: must be greater than 0, not -1"),
        ({"train": {"lr": float("nan")}}, "train.lr: must be a finite number, not nan"),
        ({"train": {"lr": float("inf")}}, "train.lr: must be a finite number, not inf"),
        ({"train": {"clip": float("nan")}}, "train.clip: must be a finite number, not nan"),
        ({"net": {"hidden": [4]}}, "net.kind: missing; say which kind it is"),
        ({"net": {"kind": "dens"}}, "net.kind: unknown kind 'dens'; did you mean dense?"),
        ({"net": {"kind": 3}}, "net.kind: unknown kind"),
        ({"net": {"kind": "other"}}, "net.width: missing; it has no default, so set it"),
        ({"net": "dense"}, "net: must be a section of fields, not 'dense'"),
        ({"train": [1]}, "train: must be a section of fields, not [1]"),
        ([1], "recipe: must be a section of fields, not [1]"),
    ],
)
def test_refusals(data, message):
    assert refusal(Plan, data).startswith(message)


def test_each_problem_has_its_line_and_the_prefix():
    message = refusal(Plan, {"train": {"epochs": 0, "lr": "fast"}, "net": {"kind": "other"}}, prefix="plan")
    assert [line.split(":")[0] for line in message.splitlines()] == [
        "plan.net.width",
        "plan.train.epochs",
        "plan.train.lr",
    ]


def test_numbers_written_as_text_are_numbers():
    assert validate(Train, {"lr": "1e-3", "epochs": "4"}) == Train(lr=0.001, epochs=4)  # YAML 1.1 reads 1e-3 as text


def test_a_bool_goes_where_bools_go():
    assert validate(Dense, {"norm": True}).norm is True
    assert validate(Other, {"width": 1, "arguments": {"bias": True}}).arguments == {"bias": True}


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Train().epochs = 5


def test_defaults_are_validated():
    class Wrong(Spec):
        epochs: PositiveInt = 0

    assert refusal(Wrong, {}) == "epochs: must be greater than 0, not 0"


class TestOverride:
    def test_one_value(self):
        assert override(Plan(), {"train.lr": 3e-4}) == Plan(train=Train(lr=3e-4))

    def test_keeps_what_else_was_set(self):
        plan = Plan(net=Dense(hidden=(7, 7)), train=Train(epochs=9))
        changed = override(plan, {"train.lr": 0.2, "net.norm": True})
        assert changed == Plan(net=Dense(hidden=(7, 7), norm=True), train=Train(epochs=9, lr=0.2))
        assert plan == Plan(net=Dense(hidden=(7, 7)), train=Train(epochs=9))

    def test_keeps_what_a_default_section_sets(self):
        assert override(Plan(), {"net.norm": True}).net == Dense(hidden=(5,), dropout=0.5, norm=True)

    def test_nothing(self):
        plan = Plan(net=Dense(), train=Train(epochs=9))  # the kind is left out, as its class says it
        assert override(plan, {}) == plan

    def test_a_whole_section_and_then_a_field_of_it(self):
        section = {"kind": "other", "width": 2}
        changed = override(Plan(), {"net": section, "net.width": 5, "net.arguments.depth": 3})
        assert changed.net == Other(width=5, arguments={"depth": 3})
        assert section == {"kind": "other", "width": 2}

    def test_a_spec_as_section(self):
        assert override(Plan(), {"net": Other(width=2), "net.width": 5}).net == Other(width=5)

    def test_a_section_that_was_none(self):
        assert override(Plan(), {"sweep.epochs": 4}).sweep == Train(epochs=4)
        assert override(Plan(sweep=Train()), {"sweep": None}).sweep is None

    def test_another_kind(self):
        plan = Plan(net=Dense())
        assert override(plan, {"net.kind": "other", "net.width": 3}).net == Other(width=3)
        assert override_refusal(plan, {"net.kind": "oter"}) == "net.kind: unknown kind 'oter'; did you mean other?"

    def test_into_free_arguments(self):
        plan = Plan(net=Other(width=1, arguments={"a": {"b": 1, "c": 2}}))
        assert override(plan, {"net.arguments.a.b": 5}).net.arguments == {"a": {"b": 5, "c": 2}}
        assert plan.net.arguments == {"a": {"b": 1, "c": 2}}

    @pytest.mark.parametrize("plan", [Plan(), Plan(net=Dense(hidden=(4, 4)), train=Train(lr=0.1))])
    @pytest.mark.parametrize(
        ("path", "section"), [("net.hidden.0", "net.hidden"), ("train.lr.x", "train.lr"), ("train.lr.x.y", "train.lr")]
    )
    def test_inside_a_value_is_refused(self, plan, path, section):
        assert override_refusal(plan, {path: 3}) == f"{path}: {section} is a value, not a section; set it as a whole"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train.epoch": 3}, "train.epoch: unknown field; did you mean epochs?"),
            ({"trian.epochs": 3}, "trian: unknown field; did you mean train?"),
            ({"model_dump.x": 3}, "model_dump: unknown field; "),
            ({"": 3}, "recipe: unknown field; "),
            ({"train.epochs": True}, "train.epochs: must not be true"),
            ({"train.epochs": 0}, "train.epochs: must be greater than 0, not 0"),
        ],
    )
    def test_refusals(self, changes, message):
        assert override_refusal(Plan(), changes).startswith(message)

    @given(st.integers(1, 99), st.floats(0, 0.99), st.booleans())
    def test_order_of_changes_does_not_matter(self, epochs, dropout, norm):
        changes = {"train.epochs": epochs, "net.dropout": dropout, "net.norm": norm}
        expected = Plan(net=Dense(hidden=(5,), dropout=dropout, norm=norm), train=Train(epochs=epochs))
        assert override(Plan(), changes) == override(Plan(), dict(reversed(changes.items()))) == expected


def test_did_you_mean():
    assert did_you_mean("dropuot", ["dropout", "hidden"]) == "did you mean dropout?"
    assert did_you_mean("q", ["b", "a"]) == "known: a, b"

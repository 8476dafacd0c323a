"""Recipe: what people write into YAML, and what they are told; what a run would do, without doing it."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.prepare import prepared
from cluster.recipe.fit import check
from cluster.recipe.loading import builtin_recipes, dump_recipe, load_recipe, parse_yaml
from cluster.recipe.optimizers import SGDSpec
from cluster.recipe.recipe import Recipe
from cluster.runs.summary import summarise
from cluster.training.run_directory import RunDirectory
from nn_models.errors import UserError
from nn_models.spec import validate
from tests.unit import made
from tests.unit.shapes import SHAPES, manifest

pytestmark = pytest.mark.filterwarnings("error")

MINIMAL = {"model": {"kind": "mlp"}, "data": {"kind": "digits"}}


def refusal(source, overrides=None) -> str:
    """The one line with which the recipe is refused."""
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path):
    """Writes a recipe file; returns its path."""

    def write(content: str | bytes, name: str = "my-recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# -- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E-3", 0.001),
        ("1.e-3", 0.001),
        ("3e+2", 300.0),
        ("+1e5", 1e5),
        ("-2.5e-1", -0.25),
        ("1_000e-3", 1.0),
        ("0.001", 0.001),
        ("12", 12),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1e-3x", "1e-3x"),
        ("'1e-3'", "1e-3"),
        ("0x1F", 31),
        ("null", None),
        ("[1e-3, 2]", [0.001, 2]),
    ],
)
def test_numbers_as_people_write_them(text, value):
    read = parse_yaml(text, name="--set")
    assert read == value
    assert type(read) is type(value)


def test_a_rate_of_1e_3_is_a_number(file):
    recipe = load_recipe(file("model: {kind: mlp}\ndata: {kind: digits}\noptimizer: {kind: sgd, lr: 1e-3}"))
    assert recipe.optimizer.lr == 0.001
    assert load_recipe(MINIMAL, {"optimizer.lr": "1e-3"}).optimizer.lr == 0.001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {kind: mlp}\nmodel: {kind: cnn}\ndata: {kind: digits}", "the key 'model' stands twice in"),
        ("model: {kind: mlp, kind: cnn}\ndata: {kind: digits}", "the key 'kind' stands twice"),
        ("model:\n\tkind: mlp", r"found character '\\t' that cannot start any token"),
        ("model: {kind: mlp", "expected ',' or '}'"),
        ("model: mlp: x", "mapping values are not allowed here"),
        ("model: *nothing", "found undefined alias 'nothing'"),
        ("model: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("{[1]: 2}", "found unhashable key"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \x00", "special characters are not allowed"),
        ("a: 2020-99-99", "month must be in 1..12"),
        ("a: !!float x", "could not convert string to float"),
        ("[" * 5000, "maximum recursion depth exceeded"),  # torch.compile raises the limit to 2000
    ],
)
def test_bad_yaml_is_named(text, message, file):
    path = file(text)
    said = refusal(path)
    assert said.startswith(f"{path}: not valid YAML: ")
    assert message.replace(r"\\", "\\") in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a recipe is a mapping with the sections model and data, not None"),
        ("# only a comment", "not None"),
        ("- model\n- data", "not ['model', 'data']"),
        ("digits-mlp", "not 'digits-mlp'"),
        ("42", "not 42"),
    ],
)
def test_what_is_no_mapping(text, said, file):
    path = file(text)
    assert refusal(path).startswith(f"{path}: a recipe is a mapping")
    assert refusal(path).endswith(said)


def test_a_file_that_is_no_text(file, tmp_path):
    path = file(b"\xff\xfe\x00model")
    assert refusal(path).startswith(f"{path}: not a recipe file that can be read (")
    assert refusal(tmp_path) == f"{tmp_path}: no such recipe file; `manta recipes` lists the built-in ones"


def test_anchors_and_merge_keys(file):
    recipe = load_recipe(
        file(
            "model: {kind: mlp}\n"
            "data: {kind: digits}\n"
            "optimizer: &shared {kind: sgd, lr: 0.5, momentum: 0.9}\n"
            "schedule: {kind: constant}\n"
        )
    )
    assert recipe.optimizer == SGDSpec(lr=0.5, momentum=0.9)
    merged = parse_yaml("base: &base {a: 1, b: 2}\nown: {<<: *base, b: 3}", name="x")
    assert merged["own"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": {"kind": "digits"}}, "model: missing; it has no default, so set it"),
        ({"model": {"kind": "mlp"}}, "data: missing"),
        (MINIMAL | {"model": None}, "model"),
        (MINIMAL | {"model": {"kind": "mpl"}}, "model.kind: unknown kind 'mpl'; did you mean mlp?"),
        (MINIMAL | {"model": {"hidden": [3]}}, "model.kind: missing; say which kind it is"),
        (MINIMAL | {"model": {"kind": "mlp", "dropoutt": 0.1}}, "model.dropoutt: unknown field; did you mean dropout?"),
        (MINIMAL | {"modle": {}}, "modle: unknown field; did you mean model?"),
        (MINIMAL | {"data": {"kind": "fashon_mnist"}}, "data.kind: unknown kind 'fashon_mnist'; did you mean fashion"),
        (MINIMAL | {"optimizer": {"kind": "sgd", "lr": 0}}, "optimizer.lr: must be greater than 0, not 0"),
        (
            MINIMAL | {"optimizer": {"kind": "sgd", "nesterov": True}},
            "optimizer: nesterov needs a momentum; set momentum",
        ),
        (MINIMAL | {"optimizer": {"kind": "adam", "lr": float("nan")}}, "optimizer.lr: must be a finite number"),
        (MINIMAL | {"train": {"epochs": 0}}, "train.epochs: must be greater than 0, not 0"),
        (MINIMAL | {"train": {"epochs": True}}, "train.epochs: must not be true"),
        (MINIMAL | {"train": {"epochs": 1.5}}, "train.epochs: must be a valid integer"),
        (MINIMAL | {"train": {"seed": 2**63}}, "train.seed: must be less than 9223372036854775808"),
        (MINIMAL | {"train": {"precision": "fp16"}}, "train.precision: must be 'fp32' or 'bf16', not 'fp16'"),
        (MINIMAL | {"train": {"ema_decay": 1.0}}, "train.ema_decay: must be less than 1"),
        (MINIMAL | {"schedule": {"kind": "step", "gamma": 1.0}}, "schedule.gamma: must be less than 1"),
        (MINIMAL | {"name": "a b"}, "name: string should match pattern"),
        (MINIMAL | {"data": {"kind": "digits", "augment": [{"kind": "flip"}]}}, "unknown kind 'flip'"),
        (
            MINIMAL | {"data": {"kind": "digits", "validation_fraction": 1}},
            "data.validation_fraction: must be less than 1",
        ),
        (MINIMAL | {"train": [1]}, "train: must be a section of fields, not [1]"),
        (
            MINIMAL | {"data": {"kind": "shards", "path": ""}},
            "data.path: string should have at least 1 character, not ''",
        ),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_errors_name_path_value_and_fix(content, message):
    assert message in refusal(content)


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as caught:
        load_recipe(MINIMAL | {"train": {"epochs": 0, "global_batch_size": 0}})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "train.epochs",
        "train.global_batch_size",
    ]


# -- names, files, paths ---------------------------------------------------------------------------------------------


def test_unknown_recipes_are_suggested():
    assert refusal("digits-mpl") == "digits-mpl: no such recipe or file; did you mean digits-mlp?"
    assert refusal("zzz").startswith("zzz: no such recipe or file; known: ")
    assert refusal("my.yaml") == "my.yaml: no such recipe file; `manta recipes` lists the built-in ones"
    assert refusal("some/where").startswith("some/where: no such recipe file")
    assert refusal("file:///nowhere/my.yaml").startswith("file:///nowhere/my.yaml: not a recipe file that can be read")
    assert refusal("gopher://x/my.yaml").startswith("gopher://x: not a place that can be read")


@pytest.mark.parametrize(
    ("name", "becomes"),
    [("my-recipe.yaml", "my-recipe"), ("my recipe.yaml", "my-recipe"), ("übung.yaml", "bung"), ("_x.y.yml", "x.y")],
)
def test_a_recipe_without_a_name_is_named_like_its_file(name, becomes, file):
    path = file("model: {kind: mlp}\ndata: {kind: digits}", name)
    assert load_recipe(path).name == becomes


def test_a_file_whose_name_leaves_nothing(file):
    assert load_recipe(file("model: {kind: mlp}\ndata: {kind: digits}", "数据.yaml")).name == "run"


def test_a_recipe_may_be_read_from_a_uri(file):
    path = file("model: {kind: mlp}\ndata: {kind: digits}")
    assert load_recipe(f"file://{path}").name == "my-recipe"


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    data = {"kind": "parquet", "path": "in/a.parquet", "test_path": "~/b.parquet", "input": "x", "target": "y"}
    recipe = load_recipe({"model": {"kind": "mlp"}, "data": data})
    assert recipe.data.path == f"{tmp_path}/in/a.parquet"
    assert recipe.data.test_path == "/home/me/b.parquet"
    for kind, field in (("image_folder", "path"), ("shards", "path"), ("mnist", "root"), ("fashion_mnist", "root")):
        for given_path, becomes in (("in", f"{tmp_path}/in"), ("~/in", "/home/me/in"), ("/in", "/in")):
            made_absolute = load_recipe({"model": {"kind": "mlp"}, "data": {"kind": kind, field: given_path}})
            assert getattr(made_absolute.data, field) == becomes
    remote = load_recipe(MINIMAL, {"data": {"kind": "shards", "path": "s3://bucket/data"}})
    assert remote.data.path == "s3://bucket/data"
    assert load_recipe(MINIMAL, {"data": {"kind": "mnist"}}).data.root is None


def test_overrides_reach_every_section():
    recipe = load_recipe(
        "digits-mlp",
        {"model.hidden": [64, 32], "train.epochs": 2, "optimizer": {"kind": "sgd"}, "data.split_seed": 3, "name": "x"},
    )
    assert recipe.model.hidden == (64, 32)
    assert recipe.train.epochs == 2
    assert recipe.optimizer.kind == "sgd"
    assert recipe.data.split_seed == 3
    assert recipe.name == "x"
    assert load_recipe(recipe) == recipe
    assert "optimizer.lrr: unknown field; did you mean lr?" in refusal("digits-mlp", {"optimizer.lrr": 1})
    assert "name.x: name is a value" in refusal("digits-mlp", {"name.x": 1})


# -- writing and reading again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_builtin_recipe_can_be_written_and_read(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    RunDirectory(str(tmp_path / "run")).begin(recipe, {})
    assert RunDirectory(str(tmp_path / "run")).recipe() == recipe


TRAPS = [
    "1e3", "1e-3", "1_0e5", ".5e3", "0x10", "0o7", "1:30", "2020-01-01", "yes", "no", "on", "null", "~", "<<", "=", "'",
    '"', "#", "a #b", "...", "---", "- a", "a: b", "-", "?", ":", "&", "*", "!", "|", ">", "%", "@", "", " ", "\n", "é",
]  # fmt: skip
texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(TRAPS)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100)
@given(st.dictionaries(texts, values, max_size=4), st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z"))
def test_any_arguments_survive_writing_and_reading(arguments, name):
    model = {"kind": "custom", "target": "some.where:Net", "arguments": arguments}
    recipe = load_recipe({"name": name, "model": model, "data": {"kind": "digits"}})
    read = validate(Recipe, parse_yaml(dump_recipe(recipe), name="recipe.yaml"))
    assert read == recipe
    assert repr(read.model.arguments) == repr(recipe.model.arguments)  # 1 is not 1.0, nor True


def test_a_run_says_what_it_cannot_read(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}: not a run's directory \(recipe.yaml is missing\)"):
        RunDirectory(str(tmp_path)).recipe()
    (tmp_path / "recipe.yaml").write_text("model: [")
    with pytest.raises(UserError, match=rf"{tmp_path}/recipe.yaml: not valid YAML"):
        RunDirectory(str(tmp_path)).recipe()


def test_a_run_claims_an_empty_directory_only(tmp_path):
    recipe = load_recipe(MINIMAL)
    RunDirectory(str(tmp_path / "run")).begin(recipe, {"seed": 0})
    with pytest.raises(UserError, match=r"a run is here already; continue it with --resume"):
        RunDirectory(str(tmp_path / "run")).begin(recipe, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/other: not an empty directory; choose another"):
        RunDirectory(str(tmp_path / "other")).begin(recipe, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/file/run: cannot be written .*choose another directory"):
        RunDirectory(str(tmp_path / "file" / "run")).begin(recipe, {})


# -- does it fit? ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        ({}, manifest(target_kind="number"), "objective.kind: classification needs a label to predict, but digits has"),
        ({"objective": {"kind": "regression"}}, manifest(), "objective.kind: regression needs a number to predict"),
        ({}, manifest(num_outputs=1), "objective.kind: classification needs at least 2 classes, but the data has 1"),
        ({}, manifest(rows=0), "data: digits has no training rows; add some"),
        ({"model": {"kind": "cnn"}}, manifest(), "model.kind: cnn reads image input, but the data has features input"),
        ({"model": {"kind": "alexnet"}}, manifest((1, 8, 8)), "model.variant: imagenet needs images of at least 63x63"),
        (
            {"model": {"kind": "cnn", "channels": [8, 8, 8, 8]}},
            manifest((1, 8, 8)),
            "makes 4 poolings by 2, which need images of at least 16x16, but the data has 8x8; shorten model.channels",
        ),
        (
            {"data": {"kind": "digits", "augment": [{"kind": "rotation"}]}},
            manifest(),
            "data.augment: digits has no images to change; leave it out",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(content, data, message):
    with pytest.raises(UserError) as caught:
        check(load_recipe(MINIMAL | content), data)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def users_files(tmp_path_factory):
    """What a user puts in place of each kind of data that is a file of theirs."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "input.txt").write_text("".join(chr(33 + number * number % 65) for number in range(50_000)))
    return {"text": {"data.path": str(folder / "input.txt")}}


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_summary_of_a_builtin_recipe(name, users_files):
    recipe = load_recipe(name)
    recipe = load_recipe(name, users_files.get(recipe.data.kind))
    data = SHAPES[recipe.data.kind] if recipe.data.kind in SHAPES else prepared(recipe.data).manifest
    check(recipe, data)
    summary = summarise(recipe, data)
    model = recipe.model.build(data.signature)
    assert summary.num_parameters == sum(p.numel() for p in model.parameters())
    assert sum(layer.num_parameters for layer in summary.layers) == summary.num_parameters
    if "row" in recipe.model.gives:
        assert summary.layers[-1].output_shape == (data.signature.num_outputs,)
    elif "halves" in recipe.model.gives:
        # the generator makes a row, which the discriminator then judges, as a whole or by patches
        made = [layer for layer in summary.layers if layer.name.startswith("generator.")][-1]
        assert math.prod(made.output_shape) == data.signature.input_size
        assert summary.layers[-1].name.startswith("discriminator.")
        assert summary.layers[-1].output_shape[:1] in [(), (1,)]
    assert summary.num_steps == summary.steps_per_epoch * recipe.train.epochs
    assert summary.steps_per_epoch == -(-data.rows("train") // recipe.train.global_batch_size)
    assert summary.rows == {split: data.rows(split) for split in data.splits}
    assert summary.parameter_bytes >= 8 * summary.num_parameters
    assert summary.activation_bytes > 0
    assert summary.data_bytes == sum(summary.rows.values()) * data.row_bytes


def test_a_summary_needs_no_memory():
    recipe = load_recipe(
        MINIMAL, {"model.hidden": [1_000_000, 1_000_000], "optimizer": {"kind": "sgd", "momentum": 0.9}}
    )
    summary = summarise(recipe, manifest())
    assert summary.num_parameters > 10**12
    assert summary.parameter_bytes == 4 * 3 * summary.num_parameters  # weights, gradients, momentum


def custom(name: str, **arguments) -> Recipe:
    model = {"kind": "custom", "target": f"tests.unit.nets:{name}", "arguments": arguments}
    return load_recipe({"model": model, "data": {"kind": "digits"}})


@pytest.mark.parametrize("name", ["Linear", "LooksAtValues", "Strided"])
def test_custom_models_that_are_well(name):
    before = torch.get_default_device()
    assert summarise(custom(name), manifest()).num_parameters in (12, 15)
    assert torch.get_default_device() == before


def test_layers_have_all_weights_of_a_model_once():
    summary = summarise(custom("Cell"), manifest())  # 4 features, 3 classes
    found = [(layer.name, layer.output_shape, layer.num_parameters) for layer in summary.layers]
    assert found == [("uncalled", (), 15), ("first", (3,), 12), ("second", (3,), 0), ("", (3,), 4)]
    assert summary.num_parameters == 31


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WrongShape", "model: custom gives (2, 4) for 2 rows where digits needs (2, 3); its last layer must have"),
        ("Frozen", "model: custom has no weights to train"),
        ("FailsToBuild", "model: custom cannot read rows of shape (4,) from digits: KeyError: 'depth'"),
        ("FailsToRun", "model: custom cannot read rows of shape (4,) from digits: IndexError: list index out of range"),
        ("Lienar", "model.target: tests.unit.nets has no Lienar; did you mean Linear?"),
    ],
)
def test_custom_models_that_are_not(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        summarise(custom(name), manifest())


def test_a_custom_model_in_no_module():
    recipe = load_recipe(MINIMAL, {"model": {"kind": "custom", "target": "no_such_package.nets:Net"}})
    with pytest.raises(UserError, match=r"model.target: cannot import no_such_package.nets.*PYTHONPATH"):
        check(recipe, manifest())
    assert "model.target: must name a module and a class" in refusal(
        MINIMAL, {"model": {"kind": "custom", "target": "x"}}
    )
    with pytest.raises(UserError, match=r"model.arguments: tests.unit.nets:Linear does not take {'depth': 3}"):
        check(custom("Linear", depth=3), manifest())


def test_a_model_of_ones_own_data(tmp_path):
    spec = made.images(tmp_path / "in", 100)
    content = {
        "model": {"kind": "cnn", "channels": [4]},
        "data": spec.model_dump(exclude_defaults=True) | {"kind": "parquet"},
    }
    summary = summarise(load_recipe(content), prepared(spec).manifest, num_workers=2)
    assert summary.rows == {"train": 80, "validation": 10, "test": 10}

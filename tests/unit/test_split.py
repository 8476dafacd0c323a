"""The split: even over classes, whole groups, a pure function of seed and rows, and what it lacks is said."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cluster
from cluster.data.manifest import SPLITS
from cluster.data.prepare import cache_key, prepared
from cluster.data.rows import table_rows
from cluster.data.sources.catalogue import AnyDataSpec
from cluster.data.sources.parquet import ParquetSpec
from cluster.data.split import TEST, TRAIN, VALIDATION, Traits, drawn
from cluster.inference.evaluate import evaluate_run
from cluster.recipe.fit import warn_about_classes
from cluster.recipe.loading import dump_recipe, load_recipe
from cluster.storage import Folder
from cluster.training.run_directory import RunDirectory
from nn_models.errors import UserError
from nn_models.spec import validate

pytestmark = pytest.mark.filterwarnings("error")


def counts(labels, splits):
    size = labels.max() + 1
    return {split: np.bincount(labels[splits == split], minlength=size) for split in (TRAIN, VALIDATION, TEST)}


def inputs(data, inside=()):
    """Split -> the different first numbers of its rows."""
    rows = {split: table_rows(data.table(split), data.manifest).columns["input"].values for split in SPLITS}
    return {split: set(values[(slice(None), 0, *inside)].tolist()) for split, values in rows.items()}


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(10, 60), min_size=1, max_size=6),
    test=st.floats(0, 0.45),
    validation=st.floats(0, 0.45),
    seed=st.integers(0, 5),
)
def test_each_class_is_held_out_evenly(sizes, test, validation, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = len(labels)
    wanted = {"num_test": round(test * rows), "num_validation": round(validation * rows)}
    splits = drawn(rows, Traits(labels), seed=seed, **wanted)
    assert (splits == TEST).sum() == wanted["num_test"]
    assert (splits == VALIDATION).sum() == wanted["num_validation"]
    assert (splits == drawn(rows, Traits(labels), seed=seed, **wanted)).all()
    found = counts(labels, splits)
    for held, number in ((found[TEST], "num_test"), (found[VALIDATION], "num_validation")):
        # a class's own rounding, and what the other classes' leaves over
        assert (np.abs(held - wanted[number] / rows * np.array(sizes)) <= 2).all()


def test_the_only_row_of_a_class_is_trained_on():
    labels = np.concatenate((np.zeros(90, np.int64), np.arange(1, 11)))
    for seed in range(5):
        splits = drawn(100, Traits(labels), seed=seed, num_test=20, num_validation=20)
        assert (splits[90:] == TRAIN).all()


def test_without_labels_the_split_is_what_it_was():
    shuffled = np.random.default_rng([7]).permutation(100)
    for labels in (None, np.zeros(100, np.int64)):
        splits = drawn(100, Traits(labels), seed=7, num_test=20, num_validation=10)
        assert sorted(shuffled[:20]) == np.flatnonzero(splits == TEST).tolist()
        assert sorted(shuffled[20:30]) == np.flatnonzero(splits == VALIDATION).tolist()


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=12, max_size=60), labelled=st.booleans(), seed=st.integers(0, 5))
def test_a_group_stays_together(sizes, labelled, seed):
    generator = np.random.default_rng(seed)
    groups = generator.permutation(np.repeat([f"p{number}" for number in range(len(sizes))], sizes)).astype(object)
    labels = generator.integers(0, 3, len(groups)) if labelled else None
    rows = len(groups)
    splits = drawn(rows, Traits(labels, groups), seed=seed, num_test=round(rows / 5), num_validation=round(rows / 5))
    for name in set(groups):
        assert len(set(splits[groups == name])) == 1
    for split in (TEST, VALIDATION):
        assert abs((splits == split).sum() - round(rows / 5)) <= max(sizes)


def test_groups_of_a_rare_class_are_held_out_too():
    groups = np.repeat(np.arange(100), 4).astype(str).astype(object)
    labels = np.zeros(400, np.int64)
    labels[::40] = 1  # one row in each of ten groups
    found = counts(labels, drawn(400, Traits(labels, groups), seed=0, num_test=80, num_validation=80))
    assert found[TEST][1] == found[VALIDATION][1] == 2


def rare(folder, **fields):
    """386 common rows and 14 rare ones."""
    generator = np.random.default_rng(0)
    x = np.concatenate((generator.normal(size=(386, 2)), generator.normal(size=(14, 2)) + 3))
    table = pa.table({"a": x[:, 0], "b": x[:, 1], "y": ["common"] * 386 + ["rare"] * 14, "who": np.arange(400) // 4})
    pq.write_table(table, folder / "rare.parquet", row_group_size=150)
    return ParquetSpec(path=str(folder / "rare.parquet"), input=("a", "b"), target="y", **fields)


def test_a_rare_class_is_in_every_split(tmp_path):
    for seed in range(10):
        manifest = prepared(rare(tmp_path, split_seed=seed)).manifest
        found = manifest.signature["target"].counts
        assert found == {"train": (309, 11), "validation": (38, 2), "test": (39, 1)}
        assert manifest.absent_classes() == {}


def test_a_class_that_a_split_lacks_is_said(tmp_path, caplog):
    random = (rare(tmp_path, split_seed=seed, stratify=False) for seed in range(50))
    data = next(spec for spec in random if len(prepared(spec).manifest.absent_classes()) == 1)
    recipe = {"model": {"kind": "mlp"}, "data": data.model_dump(), "train": {"epochs": 1}}
    with caplog.at_level(logging.WARNING):
        cluster.train(recipe, run=str(tmp_path / "run"))
    (warning,) = [record.getMessage() for record in caplog.records if "class" in record.getMessage()]
    (split,) = prepared(data).manifest.absent_classes()
    assert warning == f"data: no row of the {split} split is of the class rare"
    caplog.clear()
    gan = load_recipe("digits-dcgan")
    warn_about_classes(prepared(data).manifest, gan)
    assert not caplog.records  # it reads no classes


def test_the_cache_knows_how_it_was_split(tmp_path):
    even, random = rare(tmp_path), rare(tmp_path, stratify=False)
    assert len({cache_key(even), cache_key(random), cache_key(rare(tmp_path, group="who"))}) == 3
    sums = [[shard.sha256 for shard in prepared(spec).manifest.splits["test"]] for spec in (even, random)]
    assert sums[0] != sums[1]


def test_a_run_of_before_keeps_its_split(tmp_path):
    """An earlier version's run was split without a look at labels, and its recipe says nothing of that."""
    data = rare(tmp_path, stratify=False)
    recipe = {"model": {"kind": "mlp"}, "data": data.model_dump(), "train": {"epochs": 2}}
    outcome = cluster.train(recipe, run=str(tmp_path / "run"))
    for name in ("recipe.yaml", "model/recipe.yaml"):
        file = tmp_path / "run" / name
        text = file.read_text()
        assert "  stratify: false\n" in text
        file.write_text(text.replace("  stratify: false\n", ""))
    assert RunDirectory(Folder(tmp_path / "run")).recipe().data == data
    found = evaluate_run(outcome.run)["metrics"]
    assert found["test/loss"] == pytest.approx(outcome.metrics["test/loss"], rel=1e-6)  # in the order of other sums
    again = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert again.data == data
    assert load_recipe({"model": {"kind": "mlp"}, "data": {"kind": "digits"}}).data.stratify
    assert "stratify: true" in dump_recipe(load_recipe("digits-mlp"))


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["number", "text", "date"])
def test_rows_of_one_customer_stay_together(tmp_path, kind):
    generator = np.random.default_rng(1)
    who = generator.integers(0, 40, 600)
    column = {
        "number": pa.array(who),
        "text": pa.array([f"customer {number}" for number in who]).dictionary_encode(),
        "date": pa.array(who, pa.int32()).cast(pa.date32()),
    }[kind]
    table = pa.table({"a": who.astype(float), "y": generator.integers(0, 2, 600), "who": column})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    section = {"kind": "parquet", "path": str(tmp_path / "t.parquet"), "input": "a", "target": "y", "group": "who"}
    data = prepared(validate(AnyDataSpec, section, prefix="data"))
    seen = inputs(data)
    assert all(seen.values())
    assert set.union(*seen.values()) == set(who)
    assert sum(map(len, seen.values())) == 40  # nobody twice


def test_groups_that_do_not_fit(tmp_path):
    def data(who, **more):
        table = pa.table({"a": np.arange(60.0), "y": np.arange(60) % 2, "who": who})
        pq.write_table(table, tmp_path / "t.parquet")
        section = {"kind": "parquet", "path": str(tmp_path / "t.parquet"), "input": "a", "target": "y", "group": "who"}
        return prepared(validate(AnyDataSpec, section | more, prefix="data"))

    with pytest.raises(UserError, match=r"data\.group: 2 groups, of which none fits into the test split"):
        data(np.arange(60) % 2)
    with pytest.raises(UserError, match="no column 'whom'"):
        data(np.arange(60), group="whom")
    with pytest.raises(UserError, match="column who: 1 empty values"):
        data(pa.array([None, *range(59)]))
    with pytest.raises(UserError, match="name no groups"):
        data(pa.array([[number] for number in range(60)]))
    pq.write_table(pa.table({"a": [1.0], "y": [1], "who": [7]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"1 groups have rows in the test split's own files and .* as '7'"):
        data(np.arange(60), test_path=str(tmp_path / "test.parquet"))


def test_images_of_one_patient_stay_together(tmp_path):
    for number in range(60):
        for kind in ("sick", "well"):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.new("L", (4, 4), number % 20).save(tmp_path / kind / f"p{number % 20:02}-{number}.png")
    section = {"kind": "image_folder", "path": str(tmp_path), "channels": 1, "group": "^(p[0-9]+)-"}
    data = prepared(validate(AnyDataSpec, section, prefix="data"))
    seen = inputs(data, (0, 0))
    assert sum(map(len, seen.values())) == 20
    with pytest.raises(UserError, match=r"'q\(.\)' is not found in the name of .*\.png"):
        prepared(validate(AnyDataSpec, section | {"group": "q(.)"}, prefix="data"))
    with pytest.raises(UserError, match=r"data\.group: not a regular expression"):
        validate(AnyDataSpec, section | {"group": "("}, prefix="data")

"""encode: codes of any rows, as the model makes them, with their labels and numbers; written piece by piece."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine

import cluster
from cluster.data.prepare import prepared
from cluster.data.sources.bundled import SklearnSpec
from cluster.data.sources.images import DigitsSpec
from cluster.inference.encode import encode
from cluster.runs.coder import Coder
from nn_models.errors import UserError
from tests.unit import made

pytestmark = pytest.mark.filterwarnings("error")

K = 3
MODELS = {
    "autoencoder": ({"kind": "autoencoder", "hidden": [8], "code": K}, {"kind": "reconstruction", "loss": "bce"}),
    "conv_autoencoder": ({"kind": "conv_autoencoder", "channels": [2], "code": K}, {"kind": "denoising"}),
    "sequence_autoencoder": ({"kind": "sequence_autoencoder", "hidden": 4, "code": K}, {"kind": "reconstruction"}),
    "vae": ({"kind": "vae", "hidden": [8], "code": K}, {"kind": "variational", "samples": 0}),
    "conditional_vae": ({"kind": "conditional_vae", "hidden": [8], "code": K}, {"kind": "variational", "samples": 0}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run of each kind on digits, by name; and of a table, as `table`."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    table = {"kind": "sklearn", "table": "breast_cancer"}
    cases = {name: (*case, {"kind": "digits"}) for name, case in MODELS.items()}
    cases["table"] = (MODELS["autoencoder"][0], {"kind": "reconstruction"}, table)
    for name, (model, objective, data) in cases.items():
        recipe = {"model": model, "objective": objective, "data": data, "train": {"epochs": 1}}
        found[name] = cluster.train(recipe, run=str(folder / name), num_workers=0).run
    return found


def coder(run) -> Coder:
    model = cluster.open_model(run)
    assert isinstance(model, Coder)
    return model


def codes_of(table: pa.Table) -> np.ndarray:
    return np.array(table["code"].to_pylist(), np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_every_split_has_its_code_and_label(runs, name):
    table = pa.concat_tables(encode(runs[name]))
    data, model = prepared(DigitsSpec()), coder(runs[name])
    for split in data.manifest.splits:
        rows = made.split_rows(data, split)
        found = table.filter(pa.compute.equal(table["split"], split))
        assert found["row"].to_pylist() == rows.ids.tolist()
        labels = rows.columns["target"].values
        assert found["label"].to_pylist() == [str(label) for label in labels]
        told = {"target": labels} if name == "conditional_vae" else {}
        wanted = model.encode(rows.columns["input"].values, **told)
        # float32, in batches of another size
        np.testing.assert_allclose(codes_of(found), wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_codes_give_the_rows_that_the_model_gives(runs, name):
    model = coder(runs[name])
    rows = made.split_rows(prepared(DigitsSpec()), "test").columns
    told = {"target": rows["target"].values} if name == "conditional_vae" else {}
    pixels = rows["input"].values
    again = model.decode(model.encode(pixels, **told), **told)
    torch.testing.assert_close(again, model(pixels, **told), rtol=1e-4, atol=1e-3)  # of 255, in float32
    errors = (again / 255 - torch.tensor(pixels) / 255).square().flatten(1).mean(1)
    torch.testing.assert_close(model.errors(pixels, **told), errors, rtol=1e-3, atol=1e-6)


def test_a_source_is_taken_as_a_whole_in_its_order(runs):
    table = pa.concat_tables(encode(runs["autoencoder"], data=DigitsSpec()))
    assert table.column_names == ["row", "label", "code"]
    assert table["row"].to_pylist() == list(range(1797))
    pixels = np.round(made_digits() * 255 / 16).astype(np.uint8)
    np.testing.assert_allclose(codes_of(table), coder(runs["autoencoder"]).encode(pixels).numpy(), rtol=1e-4, atol=1e-5)


def made_digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().images[:, None]


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_a_users_file_is_read_with_the_columns_of_the_runs_data(runs, tmp_path, ending):
    bunch = load_breast_cancer()
    columns = dict(zip(map(str, bunch.feature_names), bunch.data.T, strict=True))
    columns |= {"target": bunch.target_names[bunch.target].astype(str), "who": np.arange(len(bunch.data)) % 3}
    file = tmp_path / f"rows.{ending}"
    table = pa.table(columns)
    if ending == "parquet":
        pq.write_table(table, file, row_group_size=100)
    elif ending == "csv":
        pa.csv.write_csv(table, file)
    else:
        import json

        file.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    pieces = list(encode(runs["table"], data=str(file)))
    assert len(pieces) == (6 if ending == "parquet" else 1)  # a row group at a time
    found = pa.concat_tables(pieces)
    assert found["label"].to_pylist() == columns["target"].tolist()
    wanted = coder(runs["table"]).encode(bunch.data.astype(np.float32))
    np.testing.assert_allclose(codes_of(found), wanted.numpy(), rtol=1e-4, atol=1e-5)
    others = pa.concat_tables(encode(runs["table"], data=str(file), label="who"))
    assert others["label"].to_pylist() == [str(number % 3) for number in range(len(bunch.data))]


def test_rows_without_labels_have_none(runs, tmp_path):
    bunch = load_breast_cancer()
    pq.write_table(pa.table(dict(zip(bunch.feature_names, bunch.data.T, strict=True))), tmp_path / "rows.parquet")
    found = pa.concat_tables(encode(runs["table"], data=str(tmp_path / "rows.parquet")))
    assert found.column_names == ["row", "code"]


def test_a_net_that_is_told_a_class_is_refused_rows_without(runs, tmp_path):
    spec = made.images(tmp_path, 20, shape=(1, 8, 8)).model_copy(update={"target": None})
    with pytest.raises(UserError, match="target: 'all' is none of its 10 names"):
        list(encode(runs["conditional_vae"], data=spec))


def test_what_are_no_codes_is_refused(runs):
    model = coder(runs["autoencoder"])
    with pytest.raises(UserError, match=r"codes: of shape \(2, 4\), where the model has \(rows, 3\)"):
        model.decode(torch.zeros(2, 4))
    with pytest.raises(UserError, match="codes: given nothing beside them, and not target"):
        coder(runs["conditional_vae"]).decode(torch.zeros(2, K))


# -- tables that come with scikit-learn ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "load"), [("breast_cancer", load_breast_cancer), ("wine", load_wine)])
def test_bundled_tables_are_scikit_learns(name, load):
    data, bunch = prepared(SklearnSpec(table=name)), load()
    assert data.manifest.class_names == tuple(bunch.target_names)
    parts = [made.split_rows(data, split).columns for split in data.manifest.splits]
    ours = np.column_stack([np.concatenate([part[name].values for part in parts]) for name in ("input", "target")])
    theirs = np.column_stack([bunch.data.astype(np.float32), bunch.target])
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_the_table_of_a_number_has_no_classes():
    manifest = prepared(SklearnSpec(table="diabetes")).manifest
    assert manifest.signature.describe() == "input: features 10, target: numbers 1"

"""Forecasts: errors in the series' units beside scikit-learn's and naive ones, for any number of ranks; from Python."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.linear_model import LinearRegression

import cluster
from cluster.data.prepare import prepared
from cluster.data.rows import table_rows
from cluster.inference.evaluate import evaluate_run
from cluster.inference.forecast import forecast
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from cluster.runs.opened import Forecaster, open_model
from jobs.report import write_report
from nn_models.batch import Batch, Place
from nn_models.columns import Ahead, Numbers, Sequence
from nn_models.errors import UserError
from nn_models.forecasting import ForecastSpec, persisted, steps_back
from nn_models.recurrent import GRUSpec
from nn_models.signature import Signature
from tests.unit.test_sequences import lines, ranks

STEPS, WINDOW, HORIZON, SEASON = 240, 12, 5, 4
WAYS = ("naive", "seasonal", "linear", "mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sales of two shops, with a season and one covariate; of `b` all is ten times as much."""
    place, generator = tmp_path_factory.mktemp("series"), np.random.default_rng(0)
    rows = {"day": [], "shop": [], "sales": [], "price": []}
    for shop, factor in (("a", 1), ("b", 10)):
        price = generator.normal(2, 0.2, STEPS)
        noise = np.convolve(generator.normal(0, 1, STEPS), [1, 0.8, 0.5], "same")
        rows["sales"] += list(factor * (20 + 5 * np.sin(np.arange(STEPS) * 2 * np.pi / SEASON) + noise - price))
        rows["day"] += list(map(str, np.datetime64("2023-01-01") + np.arange(STEPS)))
        rows["shop"] += [shop] * STEPS
        rows["price"] += list(price)
    pa.csv.write_csv(pa.table(rows), place / "sales.csv")
    return place


@pytest.fixture(scope="module")
def recipe(folder):
    data = {"kind": "series", "path": str(folder / "sales.csv"), "target": "sales", "covariates": ["price"]}
    data |= {"time": "day", "group": "shop", "window": WINDOW, "horizon": HORIZON, "season": SEASON}
    return {
        "name": "sales",
        "model": {"kind": "gru", "hidden": 6},
        "data": data,
        "objective": {"kind": "forecast"},
        "optimizer": {"kind": "adamw", "lr": 0.02},
        "train": {"epochs": 3, "global_batch_size": 32, "log_every_steps": 5},
    }


@pytest.fixture(scope="module")
def run(folder, recipe):
    return cluster.train(recipe, run=str(folder / "run"), num_workers=0)


def arrays(recipe, split):
    """(inputs, targets) of a split as they are stored, in float64."""
    data = prepared(load_recipe(recipe).data)
    columns = table_rows(data.table(split), data.manifest).columns
    return tuple(columns[name].values.astype(np.float64) for name in ("input", "target"))


def by_hand(past, way):
    """(rows, horizon) of the windows."""
    season = {"naive": 1, "seasonal": SEASON}[way]
    found = np.empty((len(past), HORIZON))
    for step in range(HORIZON):
        whole, back = list(range(WINDOW)), WINDOW + step
        while back not in whole:  # one season before it, or two, or as many as it takes
            back -= season
        found[:, step] = past[:, back, 0]
    return found


def test_a_run_stands_beside_simple_forecasts_in_the_series_own_units(recipe, run):
    (x, y), (past, wanted) = arrays(recipe, "train"), arrays(recipe, "test")
    said = {way: by_hand(past, way) for way in ("naive", "seasonal")}
    said["linear"] = LinearRegression().fit(x.reshape(len(x), -1), y).predict(past.reshape(len(past), -1))
    said["mean"] = np.broadcast_to(y.mean(0), wanted.shape)
    said[""] = open_model(run.run)(past).numpy()
    (change,) = prepared(load_recipe(recipe).data).manifest.signature["target"].ahead.changes
    for way, values in said.items():
        errors, prefix = values - wanted, f"test/{way}_" if way else "test/"
        found = [run.metrics[f"{prefix}{name}"] for name in ("mse", "mae", "mase")]
        # float32 windows, scaled and back; a net's own outputs in float32
        np.testing.assert_allclose(
            found, [np.square(errors).mean(), np.abs(errors).mean(), np.abs(errors).mean() / change], rtol=2e-5
        )


def test_the_scale_of_mase_is_that_of_the_seasonal_forecast_in_training(folder, recipe):
    table = pa.csv.read_csv(folder / "sales.csv").to_pandas()
    changes = []
    for _, rows in table.groupby("shop"):
        part = rows["sales"].to_numpy()[: STEPS - 2 * round(STEPS / 10)]
        changes.append(np.abs(part[SEASON:] - part[:-SEASON]))
    (change,) = prepared(load_recipe(recipe).data).manifest.signature["target"].ahead.changes
    assert change == pytest.approx(np.concatenate(changes).mean(), rel=1e-6)  # values are kept in float32


def test_evidence_has_the_errors_of_each_step_and_what_was_forecast(recipe, run):
    past, wanted = arrays(recipe, "test")
    kept = load_file(f"{run.run}/evaluation.safetensors")
    said = open_model(run.run)(past).double().numpy()
    ways = [said, by_hand(past, "naive"), by_hand(past, "seasonal")]
    errors = np.stack([np.abs(way - wanted).mean(0) for way in ways])
    np.testing.assert_allclose(kept["errors"][..., 0], errors, rtol=2e-5)  # float32, as above
    assert kept["ends"].shape == (len(past), 2, 2, 1)
    np.testing.assert_allclose(kept["ends"][:, 1, 0, 0], wanted[:, -1])
    np.testing.assert_allclose(kept["ends"][:, 0, 1, 0], said[:, 0], rtol=2e-5)
    rows = kept["example_rows"].tolist()
    assert len(set(rows)) == len(rows) == 6
    assert max(rows) - min(rows) > len(past) // 3  # from all over the split
    np.testing.assert_array_equal(kept["example_inputs"].double(), past[rows])


def test_any_number_of_ranks_comes_to_the_same(recipe, run, tmp_path):
    places = [tmp_path / str(world_size) for world_size in range(3)]
    jobs = [{"recipe": recipe, "run": str(place), "world_size": size} for size, place in enumerate(places)]
    assert ranks(jobs) == [[0], [0], [0, 0]]
    digests = [[line["rows_digest"] for line in lines(place, "train") if "rows_digest" in line] for place in places]
    assert digests[0] == digests[1] == digests[2]
    assert len(digests[0]) == 3
    names = ["loss", "mse", "mae", "mase", "r2", *(f"{way}_mae" for way in WAYS)]
    tests = [[lines(place, "test")[0][name] for name in names] for place in places]
    assert tests[0] == tests[1]
    np.testing.assert_allclose(tests[2], tests[0], rtol=1e-4)  # gradients are added up in another order
    kept = [load_file(place / "evaluation.safetensors") for place in places]
    torch.testing.assert_close(kept[1], kept[0], atol=0, rtol=0)
    assert kept[2]["example_rows"].equal(kept[0]["example_rows"])
    torch.testing.assert_close(kept[2]["errors"], kept[0]["errors"], atol=0, rtol=1e-3)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_a_seasonal_forecast_repeats_the_last_season(steps, season, more):
    past = np.arange(season + more, dtype=np.float64)
    wanted = []
    for step in range(steps):
        before = wanted[step - season] if step >= season else past[len(past) - season + step]
        wanted.append(before)
    assert [past[len(past) + place] for place in steps_back(steps, season)] == wanted
    ahead = Ahead(steps=steps, columns=("y", "x"), targets=1, changes=(1.0,))
    both = torch.from_numpy(np.stack([past, -past], 1))[None]
    assert persisted(both, ahead, season)[0, :, 0].tolist() == wanted


def test_several_columns_are_forecast_step_after_step():
    ahead = Ahead(steps=3, columns=("a", "b", "c"), targets=2, changes=(0.0, 2.0))
    signature = Signature(
        columns={"input": Sequence(width=3, length=4), "target": Numbers(size=6, ahead=ahead)},
    )
    objective = ForecastSpec().build(signature)
    past, targets = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    batch = Batch({"input": past, "target": targets}, Place.of(5), lambda: torch.arange(5), stored={"input": past})
    baseline = objective.baseline(signature, GRUSpec())
    baseline.add(batch)
    naive = baseline.models(lambda values: values, torch.device("cpu"))["naive"]
    torch.testing.assert_close(naive(past), past[:, -1, :2].repeat(1, 3), atol=0, rtol=0)
    errors = (past[:, -1, :2].repeat(1, 3) - targets).abs()
    measured = objective.measure(naive, batch)
    scaled = errors / torch.tensor([1.0, 2.0] * 3)  # what never changes is not divided by its changes
    wanted = torch.stack((errors.square().sum(), errors.sum(), scaled.sum())) / 6
    torch.testing.assert_close(measured.sums, wanted, atol=1e-12, rtol=0)  # float64


# -- in use --------------------------------------------------------------------------------------------------------


def test_an_opened_model_says_how_a_series_goes_on(recipe, run):
    model = open_model(run.run)
    assert isinstance(model, Forecaster)
    past = arrays(recipe, "test")[0][:3]
    said = model.forecast(past)
    assert said.shape == (3, HORIZON, 1)
    torch.testing.assert_close(said.flatten(1), model(past), atol=0, rtol=0)
    longer = np.concatenate([np.full((7, 2), 1e6), past[1]])  # of more steps the last ones are read
    torch.testing.assert_close(model.forecast(longer), said[1], atol=1e-5, rtol=0)  # a batch of another size
    assert "the next 5 steps of sales, in their units" in repr(model)
    for wrong, message in (
        (past[0][1:], r"past: of shape \(11, 2\), where the model reads at least 12 steps of sales, price"),
        (past[..., :1], r"of shape \(3, 12, 1\)"),
        (past[0] * np.nan, "past: NaN or infinity"),
    ):
        with pytest.raises(UserError, match=message):
            model.forecast(wrong)


def test_the_end_of_each_group_goes_on(folder, recipe, run):
    table = forecast(run.run).table()
    assert table.column_names == ["time", "group", "step", "column", "value"]
    assert table["group"].to_pylist() == ["a"] * HORIZON + ["b"] * HORIZON
    assert table["step"].to_pylist() == [*range(1, HORIZON + 1)] * 2
    days = np.datetime64("2023-01-01") + np.arange(STEPS, STEPS + HORIZON)
    assert table["time"].to_pylist() == days.tolist() * 2
    rows = pa.csv.read_csv(folder / "sales.csv").to_pandas()
    model = open_model(run.run)
    for place, (_, group) in enumerate(rows.groupby("shop")):
        wanted = model.forecast(group[["sales", "price"]].to_numpy())[:, 0]
        said = table["value"].to_numpy()[place * HORIZON :][:HORIZON]
        np.testing.assert_allclose(said, wanted, rtol=1e-6)  # batches of two rows and of one


def test_another_file_is_taken_on(folder, run):
    times = np.array(["2030-01-31", "2030-02-28", "2030-03-31"], "datetime64[D]")
    months = np.arange(np.datetime64("2029-01"), np.datetime64("2030-04")).astype("datetime64[M]")
    ends = (months + 1).astype("datetime64[D]") - 1
    assert (ends[-3:] == times).all()
    table = pa.table({"price": np.ones(len(ends)), "sales": np.arange(15.0), "day": ends, "shop": ["new"] * 15})
    pq.write_table(table, folder / "new.parquet")
    said = forecast(run.run, data=str(folder / "new.parquet")).table()
    assert [str(time) for time in said["time"].to_pylist()[:2]] == ["2030-04-30", "2030-05-31"]
    assert said["group"].unique().to_pylist() == ["new"]
    pq.write_table(table.slice(5), folder / "short.parquet")
    with pytest.raises(UserError, match=r"10 steps of 'new', but a forecast is made from 12; give a longer series"):
        forecast(run.run, data=str(folder / "short.parquet"))


def test_uneven_times_are_told(folder, run, caplog):
    table = pa.csv.read_csv(folder / "sales.csv").to_pandas().drop(index=[5])
    pa.csv.write_csv(pa.Table.from_pandas(table, preserve_index=False), folder / "uneven.csv")
    said = forecast(run.run, data=str(folder / "uneven.csv")).table()
    assert str(said["time"][0].as_py()) == "2023-08-29"
    assert "times of 1 groups, such as 'a', are not evenly spaced" in caplog.text


def test_without_times_rows_are_counted(folder, recipe, tmp_path):
    rows = pa.csv.read_csv(folder / "sales.csv").slice(0, STEPS)
    pa.csv.write_csv(rows, tmp_path / "one.csv")
    data = {**recipe["data"], "path": str(tmp_path / "one.csv"), "time": None, "group": None, "covariates": []}
    few = cluster.train({**recipe, "data": data | {"target": ["sales", "price"]}}, run=str(tmp_path / "run"))
    table = forecast(few.run).table()
    assert table.column_names == ["time", "step", "column", "value"]
    assert table["time"].to_pylist() == [step for step in range(STEPS, STEPS + HORIZON) for _ in range(2)]
    assert table["column"].to_pylist() == ["sales", "price"] * HORIZON
    assert "sales, price are forecast 5 steps ahead" in report_of(few.run)


def test_a_run_of_prepared_data_needs_a_file(folder, recipe, run, tmp_path):
    shards = {"kind": "shards", "path": prepared(load_recipe(recipe).data).folder.uri}
    few = cluster.train({**recipe, "data": shards}, run=str(tmp_path / "run"))
    with pytest.raises(UserError, match="DATA: shards keeps no whole series; name the file with the series to go on"):
        forecast(few.run)
    assert len(forecast(few.run, data=str(folder / "sales.csv")).values) == 2


def test_evaluation_gives_the_figures_of_the_run(run):
    found = evaluate_run(run.run)["metrics"]
    assert {name: run.metrics[name] for name in found} == pytest.approx(found, rel=1e-6)  # the same sums


def test_a_series_that_rises_is_forecast_by_differences(tmp_path):
    """The test part lies far above all that was seen in training."""
    generator = np.random.default_rng(0)
    y = 5.0 * np.arange(300) + 20 * np.sin(np.arange(300) * 2 * np.pi / SEASON) + generator.normal(0, 1, 300)
    pq.write_table(pa.table({"y": y}), tmp_path / "a.parquet")
    data = {"kind": "series", "path": str(tmp_path / "a.parquet"), "target": "y", "window": 8, "season": SEASON}
    data |= {"horizon": 3, "relative": True}
    rising = {"model": {"kind": "gru", "hidden": 8}, "data": data, "objective": {"kind": "forecast"}}
    rising |= {"optimizer": {"kind": "adam", "lr": 0.03}, "train": {"epochs": 20, "global_batch_size": 32}}
    few = cluster.train(rising, run=str(tmp_path / "run"), num_workers=0)
    level = load_recipe(rising, {"data.relative": False})
    whole = cluster.train(level, run=str(tmp_path / "level"), num_workers=0).metrics
    for name in ("naive_mae", "seasonal_mae", "naive_mase"):  # errors of differences are those of levels
        assert few.metrics[f"test/{name}"] == pytest.approx(whole[f"test/{name}"], rel=1e-4)  # float32 of about 1500
    assert few.metrics["test/mae"] < few.metrics["test/seasonal_mae"] / 2 < whole["test/mae"]
    model = open_model(few.run)
    past = torch.from_numpy(y[-8:, None].astype(np.float32))
    torch.testing.assert_close(model.forecast(past)[:, 0], model((past - past[-1])[None])[0] + past[-1])
    assert forecast(few.run).values[0, :, 0] == pytest.approx(model.forecast(past)[:, 0].tolist())
    assert "as differences to the last step that was read" in report_of(few.run)


@pytest.mark.slow
def test_the_sea_is_forecast_better_than_by_its_season(tmp_path):
    found = cluster.train("series-gru", run=str(tmp_path / "run"), num_workers=0).metrics
    for error in ("mse", "mae"):
        assert found[f"test/{error}"] < 0.85 * found[f"test/seasonal_{error}"]  # 0.77 and 0.48 of it; seeds differ
        assert found[f"test/{error}"] < 0.4 * found[f"test/naive_{error}"]


# -- the report ----------------------------------------------------------------------------------------------------


def report_of(where):
    with open(write_report(where)) as file:
        return file.read()


def test_the_report_shows_forecasts_beside_what_came(run):
    page = report_of(run.run)
    for text in (
        "Beside what needs no net", "linear autoregression", "sales, 1 step ahead", "sales, 5 steps ahead",
        "sales: mean absolute error by step", "Seasonal: the value 4 steps before", "sales is forecast 5 steps ahead",
    ):  # fmt: skip
        assert text in " ".join(page.split()), text
    assert page.count("<h3>sales, window ") == 6  # examples


def test_a_report_of_broken_forecasts_says_so(run, tmp_path):
    shutil.copytree(run.run, tmp_path / "run")
    path = tmp_path / "run" / "evaluation.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["signature"] = "{}"
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    assert "The forecasts: evaluation.safetensors cannot be read" in report_of(str(tmp_path / "run"))


# -- what goes together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "classification"}}, "classification needs a label to predict, but series has a number"),
        ({"model": {"kind": "mlp"}}, "model.kind: mlp reads features or image input, but the data has sequence input"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe, changes, message):
    changed = load_recipe({**recipe, **changes})
    with pytest.raises(UserError, match=message) as error:
        check(changed, prepared(changed.data).manifest)
    if "objective" in changes:
        assert str(error.value).endswith("set objective.kind to forecast")


def test_numbers_that_follow_nothing_are_no_forecast():
    adding = {"kind": "adding", "rows": 50, "length": 4}
    changed = load_recipe({"model": {"kind": "gru"}, "data": adding, "objective": {"kind": "forecast"}})
    with pytest.raises(UserError, match="forecast needs the next steps of a series, but adding has other numbers"):
        check(changed, prepared(changed.data).manifest)
    changed = load_recipe({"model": {"kind": "gru"}, "data": adding})
    with pytest.raises(UserError, match=r"set objective\.kind to regression"):
        check(changed, prepared(changed.data).manifest)


def test_only_a_forecaster_forecasts(folder, tmp_path):
    few = {"model": {"kind": "gru", "hidden": 3}, "data": {"kind": "adding", "rows": 50, "length": 4}}
    other = cluster.train({**few, "objective": {"kind": "regression"}}, run=str(tmp_path / "run"))
    with pytest.raises(UserError, match="a model trained for regression, which forecasts no series"):
        forecast(other.run)

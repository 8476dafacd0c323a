"""The report of a sweep: all trials are on the page, what is broken is named there, and nothing of it can run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cluster.recipe.distributions import parse
from cluster.recipe.loading import dump_recipe, load_recipe
from cluster.recipe.recipe import Recipe
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from cluster.tuning.space import Space
from jobs.report import write_report
from jobs.report.importance import importance
from jobs.report.trials import Trial, best_of, columns_of, read_trials
from tests.unit.test_report import Page

RECIPE: dict[str, Any] = {
    "name": "swept",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "train": {"epochs": 9},
    "sweep": {
        "space": {
            "optimizer": {
                "choice": [
                    {"kind": "adam", "lr": {"loguniform": [1e-4, 1e-1]}},
                    {"kind": "sgd", "lr": {"loguniform": [1e-3, 1]}, "momentum": {"uniform": [0, 0.9]}},
                ]
            },
            "model.hidden": {"choice": [[16], [64, 32]]},
            "train.seed": {"randint": [0, 100]},
        },
        "metric": "validation/loss",
    },
}


def record(index: int, lr: float = 1e-2, **changes: Any) -> TrialRecord:
    """A trial whose loss follows from how far its learning rate is from 1e-2."""
    overrides: dict[str, Any] = {
        "optimizer": {"kind": "adam", "lr": lr} if index % 2 else {"kind": "sgd", "lr": lr, "momentum": 0.5},
        "model.hidden": [16] if index % 3 else [64, 32],
        "train.seed": (37 * index) % 100,
    }
    value = 0.1 + math.log10(lr / 1e-2) ** 2
    found: dict[str, Any] = {"status": "finished", "value": value, "epochs": 9, "attempts": 1, "time_s": 2.5}
    told = {"index": index, "overrides": overrides, "metrics": {"validation/loss": value}}
    return TrialRecord(**{**told, **found, **changes})


def write_sweep(
    where: Path, records: list[TrialRecord], *, recipe: dict[str, Any] | Recipe = RECIPE, ended: bool = True
) -> Path:
    directory = SweepDirectory(str(where))
    loaded = load_recipe(recipe)
    directory.begin(loaded, {"seed": 0, "versions": {"torch": "2.9"}})
    for one in records:
        directory.write(one)
        if one.value is not None:
            lines = [
                {"step": 10 * (e + 1), "epoch": e, "split": "validation", "loss": one.value * (2 - e / 10), "time_s": e}
                for e in range(one.epochs)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            directory.trial(one.index).write_text("metrics.jsonl", text)
    if ended:
        best = min((one for one in records if one.value is not None), key=lambda one: one.value or 0.0, default=None)
        result: dict[str, Any] = {"status": "finished", "metric": "validation/loss", "mode": "min", "wall_s": 100.0}
        if best:
            result["best"] = {"trial": best.index, "value": best.value, "overrides": best.overrides}
            directory.folder.write_text("best.yaml", dump_recipe(loaded))
        directory.write_result(result)
        directory.write_tables(records)
    return where


def records(num: int = 12) -> list[TrialRecord]:
    made = [record(index, lr=10 ** (-4 + 4 * index / num)) for index in range(num)]
    for one in made[3:5]:
        one.status, one.epochs = "pruned", 3
    return made


def page_of(sweep: Path) -> Page:
    assert write_report(str(sweep)) == f"{sweep}/report.html"
    return Page((sweep / "report.html").read_text())


def test_everything_is_on_the_page(tmp_path):
    made = [
        *records(),
        record(12, status="failed", value=None, error="Diverged: the loss is NaN at step 7\nmore", epochs=1),
        record(13, status="invalid", value=None, error="optimizer.momentum: unknown field", epochs=0, attempts=0),
    ]
    page = page_of(write_sweep(tmp_path / "sweep", made))
    headings = ["Curves", "Values against validation/loss", "Importance", "The schedule", "Failed and refused"]
    assert page.headings == [*headings, "All trials", "Best recipe", "Recipe", "Environment"]
    best = min(made[:12], key=lambda one: one.value or 0.0)
    assert f"the best, trial {best.index}" in page.words
    assert "Diverged: the loss is NaN at step 7" in page.words
    assert "optimizer.momentum: unknown field" in page.words
    assert "searcher random scheduler asha" in page.words.replace("random random", "random")
    curve, coordinates = page.alternatives[0], page.alternatives[2]
    assert curve.startswith("validation/loss by epoch of 12 trials")
    assert "optimizer.kind, optimizer.lr, optimizer.momentum, model.hidden, train.seed" in coordinates
    assert "none" in page.words  # momentum, of Adam
    assert "Not on this page" not in page.headings
    assert page.addresses == []
    html = (tmp_path / "sweep" / "report.html").read_text()
    assert "<script" not in html
    assert html.count('class="best"') == 3  # a curve, a line of the coordinates, a row


def test_rungs_count_who_reached_them(tmp_path):
    page = page_of(write_sweep(tmp_path / "sweep", records()))
    # asha of 9 epochs: rungs at 1 and 3; two trials were stopped at 3
    assert "rung at epoch reached it went on stopped there best there 1 12 12 0" in page.words
    assert " 3 12 10 2 " in page.words


def test_a_sweep_at_a_uri(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", records())
    assert write_report(f"file://{sweep}") == f"file://{sweep}/report.html"
    assert "All trials" in Page((sweep / "report.html").read_text()).headings


def test_few_trials_have_no_importance(tmp_path):
    page = page_of(write_sweep(tmp_path / "sweep", records(5)))
    assert "Not computed: it takes 8 trials with a value, and here are 5." in page.words


def test_a_population_shows_its_lineage(tmp_path):
    recipe = {
        **RECIPE,
        "sweep": {"space": {"optimizer.lr": {"loguniform": [1e-4, 1]}}, "scheduler": "pbt", "num_trials": 2},
    }
    made = [record(index, overrides={"optimizer.lr": lr}) for index, lr in enumerate((1e-3, 2e-2))]
    made[1].lineage = [
        {"epoch": 0, "trial": 0, "set": {"optimizer.lr": 1e-3}},
        {"epoch": 2, "trial": 1, "set": {"optimizer.lr": 8e-4}},
    ]
    made[1].value = 0.01
    page = page_of(write_sweep(tmp_path / "sweep", made, recipe=recipe))
    assert "0 (epoch 1) → 1 (epoch 3)" in page.words
    assert "3 1 optimizer.lr 0.0008" in page.words
    assert "with the changes that it went through" in page.words


def test_a_sweep_that_is_still_running(tmp_path):
    made = [*records(4), record(4, status="running", epochs=2), record(5, status="waiting", value=None, epochs=0)]
    page = page_of(write_sweep(tmp_path / "sweep", made, ended=False))
    assert "unfinished" in page.words
    assert "The final result: the run has no result.json." in page.words
    assert page.alternatives[0].startswith("validation/loss by epoch of 5 trials")


def test_a_sweep_that_has_just_begun(tmp_path):
    page = page_of(write_sweep(tmp_path / "sweep", [], ended=False))
    assert "The curves: no trial has reported validation/loss yet." in page.words


def test_only_invalid_trials(tmp_path):
    made = [record(index, status="invalid", value=None, error="model.hidden: no", epochs=0) for index in range(9)]
    page = page_of(write_sweep(tmp_path / "sweep", made))
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8" in page.words


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"overrides": 3, "value": "x"}'])
def test_damaged_records_are_named(tmp_path, content):
    sweep = write_sweep(tmp_path / "sweep", records(6))
    (sweep / "trials" / "0002" / "trial.json").write_bytes(content)
    page = page_of(sweep)
    assert "Curves" in page.headings
    assert content.startswith(b'{"') or "Trial 2: trial.json cannot be read" in page.words


@pytest.mark.parametrize("name", ["recipe.yaml", "result.json", "environment.json", "best.yaml"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe\x00", b"sweep: {space: 3}"])
def test_damaged_files_are_named(tmp_path, name, content):
    sweep = write_sweep(tmp_path / "sweep", records(6))
    (sweep / name).unlink()
    if content is not None:
        (sweep / name).write_bytes(content)
    page = page_of(sweep)
    assert "All trials" in page.headings
    if content is None:
        assert f"the run has no {name}" in page.words


def test_damaged_curves_are_named(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", records())
    (sweep / "trials" / "0001" / "metrics.jsonl").write_text('{"step": 1\n[]\nnull\n')
    (sweep / "trials" / "0005" / "metrics.jsonl").unlink()
    page = page_of(sweep)
    assert "Curves of trials 1, 5: no validation/loss in their metrics.jsonl." in page.words
    assert "Lines of the trials' metrics.jsonl that cannot be read: 3." in page.words
    assert page.alternatives[0].startswith("validation/loss by epoch of 10 trials")


def test_a_trial_that_left_nothing_but_its_folder(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", records())
    (sweep / "trials" / "0042").mkdir()
    (sweep / "trials" / "notes.txt").write_text("mine")
    assert "Trial 42: the run has no trial.json." in page_of(sweep).words


def test_hostile_text_stays_text(tmp_path):
    made = [*records(), record(12, status="failed", value=None, error="<script>alert(1)</script>")]
    made[0].overrides["model.<img src=x>"] = "</svg><script>"
    html = Path(write_report(str(write_sweep(tmp_path / "sweep", made)))).read_text()
    assert "<script" not in html
    assert "<img" not in html


def test_numbers_that_cannot_be_drawn(tmp_path):
    made = records()
    sweep = write_sweep(tmp_path / "sweep", made)
    place = sweep / "trials" / "0000"
    entry = json.loads((place / "trial.json").read_text())
    (place / "trial.json").write_text(json.dumps({**entry, "value": 1e300, "epochs": math.nan}))
    (place / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "split": "validation", "loss": Infinity}\n')
    assert "Curves" in page_of(sweep).headings


def test_many_trials_stay_a_small_page(tmp_path):
    made = [record(index, lr=10 ** (-4 + index % 97 / 30)) for index in range(400)]
    sweep = write_sweep(tmp_path / "sweep", made)
    page = page_of(sweep)
    assert "The lines of 100 trials: the best 300 are drawn." in page.words
    assert (sweep / "report.html").stat().st_size < 1_500_000


def test_a_run_of_a_recipe_with_a_sweep_section_is_a_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(RECIPE)))
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "split": "validation", "loss": 1.0}\n')
    assert "All trials" not in page_of(run).headings


def trials_of(made: list[TrialRecord], tmp_path: Path) -> list[Trial]:
    return read_trials(SweepDirectory(str(write_sweep(tmp_path / "sweep", made))).folder, "validation/loss", [])


def test_importance_finds_what_matters(tmp_path):
    trials = trials_of([record(index, lr=10 ** (-4 + 4 * (index * 7 % 40) / 40)) for index in range(40)], tmp_path)
    spec = load_recipe(RECIPE).sweep
    assert spec is not None
    columns = columns_of(trials, Space(spec).distributions())
    found = importance(trials, columns)
    (first, most, _), (_, second, _) = found.rows[:2]
    assert first == "optimizer.lr"
    assert most > 5 * max(second, found.noise)
    assert found.explained > 0.5
    assert importance(trials, columns) == found  # the same each time


def test_columns_follow_the_space(tmp_path):
    trials = trials_of(records(), tmp_path)
    spec = load_recipe(RECIPE).sweep
    assert spec is not None
    columns = {column.path: column for column in columns_of(trials, Space(spec).distributions())}
    assert columns["optimizer.lr"].log
    assert columns["optimizer.lr"].categories is None
    assert not columns["optimizer.momentum"].log
    assert columns["optimizer.kind"].categories == ["adam", "sgd"]
    assert columns["model.hidden"].categories == ["[16]", "[64, 32]"]
    numbers = columns_of(trials, [("train.seed", parse({"choice": [64, 8, 0]}))])
    assert next(c for c in numbers if c.path == "train.seed").categories == sorted({(37 * i) % 100 for i in range(12)})


def test_the_best_is_one_that_came_to_its_end(tmp_path):
    trials = trials_of([record(0, lr=1e-3), record(1, lr=1e-2, status="pruned", epochs=1)], tmp_path)
    best = best_of(trials, "min")
    assert best is not None
    assert best.index == 0

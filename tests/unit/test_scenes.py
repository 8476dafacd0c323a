"""Runs on scenes: their figures and their page; models and objectives that do not fit."""

import json
from pathlib import Path

import pytest

from cluster.data.prepare import prepared
from cluster.recipe.fit import check
from cluster.recipe.loading import load_recipe
from cluster.runs.train import train
from jobs.report.page import write_report
from nn_models.errors import UserError

SMALL = {"data.rows": 80, "data.segments": 7, "train.epochs": 2, "model.hidden": 6}


def test_a_run_has_its_figures_and_its_page(tmp_path: Path):
    train(load_recipe("scenes-parser", SMALL), num_workers=0, run=str(tmp_path / "run"))
    write_report(str(tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    for name in ("bracket_f1", "random_bracket_f1", "nearest_bracket_f1"):
        assert 0 < metrics[f"test/{name}"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Joins of segments" in page
    assert "Joins in their order" in page
    assert "the most alike first" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "parsing"}}, "objective.kind: parsing"),
        ({"objective": {"kind": "classification"}}, "objective.kind: classification"),
        (
            {"model": {"kind": "parser"}},
            "objective.kind: scene_parsing takes no model that gives tree, as parser does; set",
        ),
        (
            {"model": {"kind": "parser"}, "objective": {"kind": "parsing"}},
            "objective.kind: parsing needs a tree to predict, but scenes has a scene; ",
        ),
        (
            {"data": {"kind": "listops", "rows": 60}},
            "objective.kind: scene_parsing needs a scene to predict, but listops",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    recipe = load_recipe("scenes-parser", SMALL).model_dump(mode="json", exclude_unset=True)
    recipe["model"].pop("hidden")
    recipe = load_recipe(recipe | changes)
    with pytest.raises(UserError) as refusal:
        check(recipe, prepared(recipe.data).manifest)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("field", ["segments", "side"])
def test_a_scene_of_too_many_segments_for_its_cells_cannot_be_asked_for(field):
    with pytest.raises(UserError, match=rf"data\.{field}: "):
        load_recipe("scenes-parser", {f"data.{field}": {"segments": 17, "side": 3}[field]})

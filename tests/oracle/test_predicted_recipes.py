"""Every recipe whose data is on every machine: what its model predicts of the test split has evaluate's figures."""

import pyarrow as pa
import pytest
import torch

import cluster
from cluster.data.prepare import prepared
from cluster.inference.predictions import Prediction
from cluster.recipe.loading import builtin_recipes, dump_recipe, load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import save_model

ALWAYS_THERE = ("digits", "sklearn", "python_docs", "el_nino", "docstrings", "adding", "copy", "listops", "scenes")
PREDICTS = ("row", "elements", "tree", "joins")


def chosen() -> list[str]:
    recipes = {name: load_recipe(name) for name in builtin_recipes()}
    there = {name: recipe for name, recipe in recipes.items() if recipe.data.kind in ALWAYS_THERE}
    return [name for name, recipe in there.items() if recipe.model.gives & {*PREDICTS}]


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen())
def test_a_recipes_test_split(name, tmp_path):
    """Weights that have learned nothing will do: it is the same rows, batches and sums that are to be shown."""
    recipe = load_recipe(name).model_copy(update={"sweep": None})
    manifest = prepared(recipe.data).manifest
    torch.manual_seed(0)
    net, run = recipe.model.build(manifest.signature), Folder(tmp_path)
    save_model(run, net.state_dict(), best={"metric": "loss", "value": 1.0, "epoch": 1, "step": 1}, manifest=manifest)
    run.write_text("model/recipe.yaml", dump_recipe(recipe))
    prediction = Prediction(str(tmp_path))
    table = pa.concat_tables(prediction.tables())
    evaluated = cluster.evaluate(str(tmp_path))
    assert prediction.metrics() == evaluated["metrics"]
    assert table["row"].to_pylist() == list(range(evaluated["rows"]))

"""What the README says works: its recipe, its commands, its Python."""

import re
from pathlib import Path

import pytest

import cluster
from cluster.recipe.loading import builtin_recipes, load_recipe, parse_yaml
from tests.cli.command_lines import blocks, lines_of, parse_manta

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_its_recipe_is_the_built_in_one():
    shown = next(block for block in blocks(README, "yaml") if block.startswith("name: fashion-cnn"))
    assert load_recipe(parse_yaml(shown, name="README.md")) == load_recipe("fashion-cnn")


def test_its_table_lists_every_recipe():
    table = set(re.findall(r"^\| `([a-z0-9-]+)`", README, re.MULTILINE))
    assert set(builtin_recipes()) <= table


@pytest.mark.parametrize("line", lines_of(README, "manta"))
def test_its_commands_parse(line):
    parse_manta(line)


@pytest.mark.ray
def test_its_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks(README, "python") if "cluster.train" in block)
    names: dict = {}
    exec(code, names)
    assert names["outcome"].status == "finished"
    assert isinstance(names["outcome"], cluster.Outcome)
    assert names["scores"].shape == (3, 10)
    assert names["model"].predict(names["images"]) == [str(n) for n in names["scores"].argmax(1).tolist()]
    assert sum(p.numel() for p in names["net"].parameters()) == 61_100_840

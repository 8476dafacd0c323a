"""What the README says works: its recipe, its commands, its Python."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

import cluster
from cluster.recipe.loading import builtin_recipes, load_recipe, parse_yaml
from jobs.cli import app

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [text for kind, text in fenced if kind == language]


def test_its_recipe_is_the_built_in_one():
    shown = next(block for block in blocks("yaml") if block.startswith("name: fashion-cnn"))
    assert load_recipe(parse_yaml(shown, name="README.md")) == load_recipe("fashion-cnn")


def test_its_table_lists_every_recipe():
    table = set(re.findall(r"^\| `([a-z0-9-]+)`", README, re.MULTILINE))
    assert set(builtin_recipes()) <= table


COMMANDS = [line for block in blocks("") for line in block.splitlines() if line.startswith("manta ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_parse(line):
    arguments = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    context = command.make_context("manta", arguments, resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    for pair in context.params.get("set_") or []:
        yaml.safe_load(pair.partition("=")[2])


@pytest.mark.ray
def test_its_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("python") if "cluster.train" in block)
    names: dict = {}
    exec(code, names)
    assert names["outcome"].status == "finished"
    assert isinstance(names["outcome"], cluster.Outcome)
    assert names["scores"].shape == (3, 10)
    assert names["model"].predict(names["images"]) == [str(n) for n in names["scores"].argmax(1).tolist()]
    assert sum(p.numel() for p in names["net"].parameters()) == 61_100_840

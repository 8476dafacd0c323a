"""Files in the current directory: custom models are found there, and no file takes a library's place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTRIES = {"script": ["-P", "-c", "from jobs.cli import main; main()"], "module": ["-m", "jobs"]}
LIBRARIES = ("cluster", "nn_models", "yaml", "numpy", "torch", "pydantic", "typer", "rich", "nothing")
NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
"""
RECIPE = "{name: own, model: {kind: custom, target: 'nets:Net'}, data: {kind: digits}, train: {epochs: 1}}\n"


@pytest.fixture
def here(tmp_path):
    for name in LIBRARIES:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name}.py was imported')\n")
    (tmp_path / "nets.py").write_text(NET)
    (tmp_path / "own.yaml").write_text(RECIPE)
    return tmp_path


def run(entry: str, here: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *ENTRIES[entry], *arguments]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_file_with_a_librarys_name_is_not_imported(here, entry):
    done = run(entry, here, "models", "mlp")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_custom_model_is_found_where_the_user_is(here, entry):
    done = run(entry, here, "show", "own.yaml")
    assert done.returncode == 0, done.stderr


def test_only_commands_that_build_models_look_there_and_last(manta, here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for command in (["recipes"], ["models", "mlp"]):
        assert manta(*command)[0] == 0
        assert str(here) not in sys.path
    assert manta("show", "digits-mlp")[0] == 0
    assert sys.path[-1] == str(here)


def test_the_packages_in_the_current_directory_itself_are_used(tmp_path):
    """As in a checkout that nobody has installed."""
    for package in ("jobs", "cluster", "nn_models"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "cluster" / "__init__.py").open("a") as file:
        file.write("print('this one')\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "jobs", "recipes"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this one" in done.stdout

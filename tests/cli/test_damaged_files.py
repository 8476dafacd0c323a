"""Files of a run, a sweep or a data set that are damaged, or of another version: one line with file and fix."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import cluster
from cluster.data.prepare import prepare
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.tuning.ledger import SweepDirectory, TrialRecord
from tests.unit import made

STEP = "checkpoints/step-0000000004.pt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a finished `run`, one that stands after its first epoch, `half`, a `sweep`, and its `shards`."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = {
        "name": "tiny",
        "model": {"kind": "mlp", "hidden": [4], "batch_norm": True},
        "data": made.features(folder / "rows", 80).model_dump(),
        "optimizer": {"kind": "adamw"},
        "train": {"epochs": 2, "global_batch_size": 20, "ema_decay": 0.9},
    }
    cluster.train(recipe, run=str(folder / "run"))
    shutil.copytree(folder / "run", folder / "half")
    (folder / "half" / "result.json").unlink()
    sorted((folder / "half" / "checkpoints").iterdir())[-1].unlink()
    prepare(load_recipe(recipe).data, Folder(folder / "shards"))
    swept = load_recipe(recipe | {"sweep": {"space": {"optimizer.lr": {"uniform": [0.1, 1]}}, "num_trials": 2}})
    sweep = SweepDirectory(str(folder / "sweep"))
    sweep.begin(swept, {})
    for index in range(2):
        sweep.write(TrialRecord(index, {"optimizer.lr": 0.5}, status="finished", value=0.5, epochs=2))
        sweep.trial(index).write_json("lineage.json", [{"epoch": 0, "trial": index, "set": {"optimizer.lr": 0.5}}])
    return folder


@pytest.fixture
def place(whole, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "place")
    return tmp_path / "place"


def written(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def test_a_result_of_wrong_types(place, refused):
    file, run = place / "run" / "result.json", place / "run"
    for change in ({"status": 3}, {"status": "over"}, {"metrics": []}, {"metrics": {"a": "b"}}, {"rollbacks": [4]}):
        shutil.copy(place / "half" / "environment.json", file)
        written(file, {"status": "finished", "metrics": {}} | change)
        message = refused("train", run / "recipe.yaml", "--run", run, "--resume")
        assert message.startswith(f"{file}: damaged ({next(iter(change))}")
        assert message.endswith("; restore it, or delete it")


@pytest.mark.parametrize("content", [[1], "x", {"data": 3}, {"data": {"rows": [1]}}])
def test_an_environment_of_wrong_types(content, place, refused):
    run = place / "half"
    written(run / "environment.json", content)
    message = refused("train", run / "recipe.yaml", "--run", run, "--resume")
    assert message.startswith(f"{run}/environment.json: damaged (")
    assert message.endswith("; restore it, or delete it")


@pytest.mark.parametrize(
    "name", ["environment.json", "result.json", "metrics.jsonl", "model/recipe.yaml", "model/model.safetensors", STEP]
)
def test_a_directory_where_a_file_should_be(name, place, refused):
    run = place / "half"
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    message = refused("train", run / "recipe.yaml", "--run", run, "--resume")
    assert message.startswith(f"{run}/{name}: cannot be ")
    assert "directory" in message


def test_a_file_where_a_directory_should_be(place, refused):
    run = place / "half"
    shutil.rmtree(run / "model")
    (run / "model").write_text("")
    message = refused("train", run / "recipe.yaml", "--run", run, "--resume")
    assert message.startswith(f"{run}/model/recipe.yaml: cannot be written (")


def other_version(state: dict[str, Any], field: str, how: str) -> None:
    *sections, name = field.split("/")
    for section in sections:
        state = state[section]
    if how == "missing":
        del state[name]
    elif how == "renamed":
        state[f"{name}_of_rank"] = state.pop(name)
    else:
        state[name] = {"text": "three", "number": 7, "nothing": None}[how]


@pytest.mark.parametrize(
    ("field", "how"),
    [
        ("optimizer", "missing"),
        ("recipe", "missing"),
        ("recipe", "text"),
        ("rows", "missing"),
        ("data", "number"),
        ("world_size", "missing"),
        ("generators", "nothing"),
        ("generators", "number"),
        ("average", "text"),
        ("model/output.weight", "renamed"),
        ("model/output.weight", "number"),
        ("optimizer/param_groups", "missing"),
        ("progress/epoch", "text"),
        ("progress/sums", "number"),
        ("progress/best", "text"),
        ("progress", "nothing"),
    ],
)
def test_a_checkpoint_of_another_version(field, how, place, refused):
    run = place / "half"
    state = torch.load(run / STEP, weights_only=True)
    if (field, how) == ("rows", "missing"):
        del state["data"]
    other_version(state, field, how)
    torch.save(state, run / STEP)
    message = refused("train", run / "recipe.yaml", "--run", run, "--resume")
    assert "\n" not in message
    assert message.startswith(f"{run}/{STEP}: not a checkpoint that this version of manta can go on from (")
    assert message.endswith("; use the version that has written it, or delete it")


def test_a_line_of_metrics_of_wrong_types_counts_as_none(place, manta):
    run = place / "half"
    first, *others = (run / "metrics.jsonl").read_text().splitlines()
    broken = [json.dumps({**json.loads(first), **change}) for change in ({"step": None}, {"epoch": {}}, {"split": 3})]
    (run / "metrics.jsonl").write_text("\n".join([*broken, first, *others]))
    assert manta("train", run / "recipe.yaml", "--run", run, "--resume")[0] == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len([first, *others])


def header(file: Path, change: dict[str, Any], *, within: str | None = None) -> None:
    """Change what a safetensors file says of its tensors, or what its metadata hold under a name."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    said = json.loads(content[8:start])
    if within:
        said["__metadata__"][within] = json.dumps(json.loads(said["__metadata__"][within]) | change)
    else:
        said |= change
    text = json.dumps(said).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


@pytest.mark.parametrize(
    ("change", "within"),
    [
        ({"columns": {"input": "é"}}, "data"),
        ({"splits": 3}, "data"),
        ({"value": "best"}, "best"),
        ({"epoch": None}, "best"),
        ({"__metadata__": {}}, None),
        ({"output.weight": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}, None),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_weights_whose_header_says_something_else(change, within, command, place, refused):
    run = place / "half"
    header(run / "model" / "model.safetensors", change, within=within)
    message = refused(*({"evaluate": ["evaluate", run], "train": resuming(run)}[command]))
    assert "\n" not in message
    assert message.startswith(f"{run}/model/model.safetensors: damaged (")
    assert message.endswith("; train again or restore the file")


def resuming(run: Path) -> list[Any]:
    return ["train", run / "recipe.yaml", "--run", run, "--resume"]


def test_a_model_of_other_sizes_takes_no_memory(place, refused):
    """Weights of a terabyte are not asked for to find that the file has others."""
    run = place / "run"
    file = run / "model" / "recipe.yaml"
    file.write_text(file.read_text().replace("hidden: [4]", "hidden: [1000000000000]"))
    message = refused("evaluate", run)
    assert message.startswith(f"{run}/model/model.safetensors: not the weights of {file} (")
    assert "\n" not in message


def test_a_recipe_of_another_version(place, refused):
    run = place / "run"
    file = run / "model" / "recipe.yaml"
    file.write_text(file.read_text().replace("hidden: ", "hidden_layers: "))
    assert refused("evaluate", run) == (
        f"{file}: no recipe that this version of manta can read (model.hidden_layers: unknown field); restore it, or "
        "use the version that has written it"
    )


# -- sweeps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"status": "over"}, {"overrides": 3}, {"epochs": "two"}, {"metrics": [1]}, {"index": 1}, {"lineage": 1}]
)
def test_a_record_of_a_trial_of_wrong_types(change, place, refused):
    file = place / "sweep" / "trials" / "0000" / "trial.json"
    written(file, json.loads(file.read_text()) | change)
    message = refused("sweep", place / "sweep" / "recipe.yaml", "--run", place / "sweep", "--resume")
    assert message.startswith(f"{file}: damaged (")
    assert message.endswith(f"; delete {file.parent} to run it again")


@pytest.mark.parametrize("content", [3, [3], [{"epoch": "x", "trial": 0, "set": {}}], [{"epoch": 0}]])
def test_a_lineage_of_wrong_types(content, place, refused):
    trial = place / "sweep" / "trials" / "0000"
    written(trial / "lineage.json", content)
    written(trial / "trial.json", json.loads((trial / "trial.json").read_text()) | {"status": "running"})
    message = refused("sweep", place / "sweep" / "recipe.yaml", "--run", place / "sweep", "--resume")
    assert message.startswith(f"{trial}/lineage.json: damaged (")
    assert message.endswith(f"; delete {trial} to run it again")


# -- sizes that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["train", "digits-mlp", "--set", "data.image_size=[16384, 16384]"], "data: "),
        (["data", "prepare", "{kind: digits, image_size: [16384, 16384]}", "--out", "out"], "data: "),
        (["train", "digits-mlp", "--set", "model.hidden=[1000000000000]"], "model: "),
        (["train", "digits-mlp", "--workers", "99999999999"], "train.global_batch_size: "),
        (["train", "digits-mlp", "--workers", "50", "--set", "train.cpus_per_worker=999999999"], "--workers: "),
        (["data", "prepare", "digits", "--out", "out", "--workers", "99999999999"], "--workers: "),
        (["sweep", "digits-mlp", "--set", "train.cpus_per_worker=999999999"], "--workers: "),
        (["train", "digits-mlp", "--set", "train.global_batch_size=1000000000", "--workers=999999999"], "--workers: "),
    ],
)
def test_an_impossible_size_is_refused_before_memory_is_taken(arguments, path, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(*arguments)
    assert message.startswith(path)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("recipe", "change"),
    [("digits-cnn", "model.convolutions_per_block=1000000000"), ("pix2pix", "model.levels=1000000000")],
)
def test_more_layers_than_there_can_be(recipe, change, refused, tmp_path):
    pairs = "data={kind: pairs, edges_of: {kind: digits}}"
    named = ["digits-cnn"] if recipe == "digits-cnn" else ["fashion-pix2pix", "--set", pairs]
    message = refused("train", *named, "--set", change, "--run", tmp_path / "run")
    assert message.startswith(("model: has more than 10,000 layers", "model.levels: must be less than or equal to 14"))


def test_a_billion_layers(refused, tmp_path):
    nets = "tests.unit.nets:Layers"
    model = f"model={{kind: custom, target: '{nets}', arguments: {{number: 1000000000}}}}"
    message = refused("train", "digits-mlp", "--set", model, "--run", tmp_path / "run")
    assert message == "model: has more than 10,000 layers; ask for fewer"

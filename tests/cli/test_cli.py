"""The command line as a user types it, right and wrong."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cluster.training.run_directory import RunDirectory


def test_help_is_quick_because_it_imports_nothing_heavy():
    heavy = {"torch", "ray", "matplotlib", "sklearn", "pyarrow"}
    code = f"import sys, jobs.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_in_process_training_imports_no_ray(tmp_path):
    code = (
        "import sys, cluster; cluster.train('digits-mlp', run=sys.argv[1], overrides={'train.epochs': 1}); "
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")]).returncode == 0


def test_train_evaluate_report(manta, tmp_path):
    run = tmp_path / "run"
    code, out, err = manta("train", "digits-mlp", "--run", run, "--set", "train.epochs=3", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["status"] == "finished"
    assert result["run"] == str(run)
    assert result["metrics"]["test/accuracy"] > 0.8
    assert "epoch 3/3" in err
    on_disk = json.loads((run / "result.json").read_text())
    assert on_disk["metrics"] == result["metrics"]
    names = ("recipe.yaml", "environment.json", "metrics.jsonl", "report.html", "model/model.safetensors", "events")
    for name in names:
        assert (run / name).exists(), name
    assert "digits-mlp" in (run / "report.html").read_text()

    code, out, _ = manta("evaluate", run, "--json")
    assert code == 0
    assert json.loads(out)["metrics"] == pytest.approx(
        {name: value for name, value in result["metrics"].items() if name.startswith("test/")}, abs=1e-9
    )
    (run / "report.html").unlink()
    assert manta("report", run)[0] == 0
    assert (run / "report.html").exists()


def test_the_written_recipe_reproduces_the_run(manta, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    torch.set_num_threads(1)
    assert manta("train", "digits-mlp", "--run", runs[0], "--set", "train.epochs=2")[0] == 0
    assert manta("train", runs[0] / "recipe.yaml", "--run", runs[1])[0] == 0
    first, second = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_of_a_finished_run_trains_nothing(manta, tmp_path):
    run = tmp_path / "run"
    manta("train", "digits-mlp", "--run", run, "--set", "train.epochs=1")
    before = (run / "metrics.jsonl").read_bytes()
    code, out, _ = manta("train", run / "recipe.yaml", "--run", run, "--resume", "--json")
    assert code == 0
    assert json.loads(out)["status"] == "finished"
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("group", [[], ["submit"], ["jobs"], ["data"]])
def test_a_group_of_commands_shows_its_help_and_complains_of_nothing(manta, group):
    code, out, err = manta(*group)
    assert (code, err) == (2, "")
    assert "Commands" in out


def test_show_models_recipes(manta):
    code, out, _ = manta("show", "digits-cnn", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["num_parameters"] == 53_098
    assert facts["num_steps"] == facts["steps_per_epoch"] * 30
    assert sum(layer["num_parameters"] for layer in facts["layers"]) == facts["num_parameters"]
    assert "digits-cnn" in manta("recipes")[1]
    assert set(json.loads(manta("models", "--json")[1])) >= {"mlp", "cnn", "gan", "pix2pix", "custom"}
    assert "kernel_size" in manta("models", "cnn")[1]


def test_prepare_and_inspect(manta, tmp_path):
    out = tmp_path / "digits"
    assert manta("data", "prepare", "digits", "--out", out, "--set", "split_seed=3")[0] == 0
    code, text, _ = manta("data", "inspect", out)
    assert code == 0
    assert "1,258 rows" in text
    data = f"data={{kind: shards, path: {out}}}"
    assert manta("train", "digits-mlp", "--set", data, "--set", "train.epochs=1", "--run", tmp_path / "run")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits-mpl"], "digits-mpl: no such recipe or file; did you mean digits-mlp?"),
        (["train", "nowhere/x.yaml"], "nowhere/x.yaml: no such recipe file; `manta recipes` lists the built-in ones"),
        (["train", "digits-mlp", "--set", "model.hiden=3"], "model.hiden: unknown field; did you mean hidden?"),
        (["train", "digits-mlp", "--set", "train.epochs=many"], "train.epochs: must be a valid integer"),
        (["train", "digits-mlp", "--set", "train.epochs=0"], "train.epochs: must be greater than 0, not 0"),
        (["train", "digits-mlp", "--set", "optimizer.lr=-1"], "optimizer.lr: must be greater than 0, not -1"),
        (["train", "digits-mlp", "--set", "optimizer.lr=.nan"], "optimizer.lr: "),
        (["train", "digits-mlp", "--set", "optimizer.kind=adamm"], "optimizer.kind: unknown kind 'adamm'; did you"),
        (["train", "digits-mlp", "--set", "epochs"], "--set: 'epochs' is not PATH=VALUE"),
        (["train", "digits-mlp", "--workers", "two"], "--workers: 'two' is not a number of workers"),
        (["train", "digits-mlp", "--workers", "3-2"], "--workers: '3-2'"),
        (["train", "digits-mlp", "--resume"], "--resume: say which run to continue with --run DIR"),
        (["train", "digits-mlp", "--resume", "--run", "typo"], "typo holds no run to continue; check --run"),
        (["train", "digits-mlp", "--run", ""], "'': not a place"),
        (["train", "digits-mlp", "--workers=1", "--address=ray://127.0.0.1:1"], "the Ray client cannot drive training"),
        (["train", "digits-mlp", "--set", "data.image_size=[1000000, 1000000]"], "data.image_size.0: "),
        (["evaluate", "/dev/null"], "not a run's directory"),
        (["data", "inspect", "/dev/null"], "no prepared data set here"),
        (["train", "digits-mlp", "--address", "127.0.0.1:1"], "--address: training with --workers 0 uses no cluster"),
        (["train", "digits-mlp", "--set", "model.activation=relo"], "model.activation: "),
        (["train", "digits-mlp", "--set", "objective.kind=regression"], "objective.kind: regression needs a number"),
        (["train", "digits-mlp", "--set", "data={kind: image_folder, path: gone}"], "data.path: "),
        (["train", "digits-mlp", "--set", "data={kind: parquet, path: gone, input: a, target: b}"], "data.path: "),
        (["train", "digits-mlp", "--set", "data={kind: shards, path: gone}"], "no prepared data set here"),
        (["train", "digits-mlp", "--set", "data={kind: fashion_mnist, root: gone}"], "gone"),
        (["train", "digits-mlp", "--set", "model={kind: custom, target: 'no.such:Net'}"], "model.target: "),
        (["train", "digits-mlp", "--workers", "100"], "train.global_batch_size: 64 rows cannot be shared by 100"),
        (["train", "digits-mlp", "--set=model.batch_norm=true", "--set=train.global_batch_size=1"], "a single row"),
        (["show", "digits-cnn", "--set", "model.channels=[8, 8, 8, 8]"], "model.channels: "),
        (["show", "digits-cnn", "--set", "model.kind=alexnet"], "model."),
        (["models", "lstmm"], "lstmm"),
        (["evaluate", "gone"], "not a run's directory"),
        (["evaluate", "gone", "--split", "tset"], "--split: 'tset' is no split; did you mean test?"),
        (["report", "gone"], "gone"),
        (["data", "inspect", "gone"], "no prepared data set here"),
        (["data", "prepare", "digit", "--out", "x"], "data.kind: unknown kind 'digit'; did you mean digits?"),
        (["trian"], "No such command 'trian'"),
        (["train", "digits-mlp", "--worker", "2"], "No such option"),
        (["train"], "Missing argument"),
    ],
)
def test_what_a_user_must_change(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_gpu_that_is_not_there(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--gpu: torch finds no GPU" in refused("train", "digits-mlp", "--gpu", "--run", tmp_path / "run")


def test_no_cluster_at_the_address(refused, tmp_path):
    message = refused("train", "digits-mlp", "--workers", "1", "--address", "127.0.0.1:1", "--run", tmp_path / "run")
    assert "--address: 127.0.0.1:1: no Ray cluster answers there" in message
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(manta, refused, tmp_path):
    run = tmp_path / "run"
    manta("train", "digits-mlp", "--run", run, "--set", "train.epochs=1")
    assert "a run is here already; continue it with --resume" in refused("train", "digits-mlp", "--run", run)
    message = refused("train", "digits-mlp", "--run", run, "--resume", "--set", "optimizer.lr=1")
    assert "optimizer.lr" in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "not an empty directory" in refused("train", "digits-mlp", "--run", tmp_path / "mine")


@pytest.mark.parametrize(
    "placed",
    [[], ["--workers", "2"], ["--workers", "1-2", "--address", "head:6379", "--gpu"], ["--gpu"]],
    ids=lambda placed: " ".join(placed) or "in process",
)
def test_an_interrupted_run_says_how_to_go_on_as_it_began(manta, tmp_path, monkeypatch, placed):
    run = tmp_path / "my run"

    def interrupted(recipe, *, run, **_):
        RunDirectory(run).begin(recipe, {})
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.runs.train.train", interrupted)
    code, _, err = manta("train", "digits-mlp", "--run", run, *placed)
    assert code == 130
    (line,) = [line for line in err.splitlines() if "to go on" in line]
    words = shlex.split(line.partition("to go on: ")[2])
    assert words == ["manta", "train", f"{run}/recipe.yaml", "--run", str(run), "--resume", *placed]


def test_an_occupied_directory_is_found_before_any_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.runs.train.prepared", lambda *_: pytest.fail("the data is converted"))
    (tmp_path / "thesis.tex").write_text("")
    message = refused("train", "digits-mlp", "--run", tmp_path, "--workers", "1")
    assert message == f"{tmp_path}: not an empty directory; choose another one with --run"


def test_a_directory_that_cannot_be_written(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in refused("train", "digits-mlp", "--run", file / "run")
    if os.getuid() != 0:  # root may write everywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert "cannot be written" in refused("train", "digits-mlp", "--run", tmp_path / "run")


def test_a_diverging_run_fails_with_its_step(manta, tmp_path):
    run = tmp_path / "run"
    wild = "optimizer={kind: sgd, lr: 1.0e+30}"
    code, out, err = manta("train", "digits-mlp", "--run", run, "--set", wild)
    assert code == 1
    assert out == ""
    assert "NaN or infinite at step" in err.splitlines()[-1]
    assert json.loads((run / "result.json").read_text())["status"] == "failed"


def test_damaged_shards(manta, refused, tmp_path):
    data = tmp_path / "data"
    manta("data", "prepare", "digits", "--out", data)
    use = ("train", "digits-mlp", "--set", f"data={{kind: shards, path: {data}}}", "--run", tmp_path / "run")
    shard = data / "train-00000.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert f"{shard}: the shard has {len(content) - 100} bytes where the manifest says {len(content)}" in refused(*use)
    flipped = bytearray(content)
    flipped[1000] ^= 1
    shard.write_bytes(flipped)
    assert f"{shard}: the shard does not have the checksum" in refused(*use)
    assert "checksum" in refused("data", "inspect", data)
    shard.unlink()
    assert f"{shard}: the shard is missing" in refused(*use)
    (data / "manifest.json").write_text("{")
    assert "not valid JSON" in refused(*use)
    assert not (tmp_path / "run").exists()


def test_bad_pictures(refused, tmp_path):
    from PIL import Image

    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(photos / name / f"{number}.png")
    use = ("train", "digits-mlp", "--set", f"data={{kind: image_folder, path: {photos}}}", "--run", tmp_path / "run")
    (photos / "emu").mkdir()
    assert f"{photos}/emu: no images in this class folder; add some or remove it" in refused(*use)
    (photos / "emu").rmdir()
    (photos / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    assert f"{photos}/cat/0.png: not a readable image" in refused(*use)


def test_a_recipe_file_with_mistakes(refused, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {kind: mlp\ndata: {kind: digits}\n")
    assert f"{recipe}: not valid YAML" in refused("train", recipe)
    recipe.write_text("")
    assert "a recipe is a mapping" in refused("train", recipe)
    recipe.write_text("model: {kind: mlp}\nmodel: {kind: cnn}\ndata: {kind: digits}\n")
    assert "stands twice" in refused("train", recipe)
    recipe.write_text("data: {kind: digits}\n")
    assert "model: missing" in refused("train", recipe)


def test_a_custom_model_from_the_users_folder(manta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width, signature):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(signature.input_size, width), nn.ReLU(),\n"
        "                         nn.Linear(width, signature.num_outputs))\n"
    )
    model = "model={kind: custom, target: 'my_nets:Net', arguments: {width: 32}}"
    code, _, _ = manta("train", "digits-mlp", "--set", model, "--set", "train.epochs=2", "--run", "run")
    assert code == 0
    assert manta("evaluate", "run")[0] == 0


def test_a_runs_files_run_no_commands(manta, refused, tmp_path):
    run = tmp_path / "run"
    assert manta("train", "digits-mlp", "--set", "train.epochs=1", "--run", run)[0] == 0
    recipe = yaml.safe_load((run / "model" / "recipe.yaml").read_text())
    arguments = {"args": f"touch {tmp_path / 'here'}", "shell": True}
    recipe["model"] = {"kind": "custom", "target": "subprocess:run", "arguments": arguments}
    (run / "model" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "model.target: subprocess:run is a function not annotated" in refused("evaluate", run)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(5)", "SystemExit: 5"),
        ("import no_such_thing", "cannot import"),
    ],
)
def test_a_custom_model_that_cannot_be_imported(refused, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"broken_{abs(hash(message))}"
    Path(f"{name}.py").write_text(content)
    assert message in refused("show", "digits-mlp", "--set", f"model={{kind: custom, target: '{name}:Net'}}")


def test_a_run_with_damaged_files(manta, refused, tmp_path):
    run = tmp_path / "run"
    manta("train", "digits-mlp", "--run", run, "--set", "train.epochs=1")
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('[]\nnull\n{"step": 1}\n{"step"')
    assert manta("train", run / "recipe.yaml", "--run", run, "--resume")[0] == 0
    (run / "model" / "recipe.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in refused("evaluate", run)
    (run / "model" / "recipe.yaml").unlink()
    (run / "model" / "recipe.yaml").mkdir()
    assert "cannot be read" in refused("evaluate", run)


def test_a_reader_that_has_seen_enough_is_no_failure():
    command = f"set -o pipefail; {sys.executable} -m jobs models alexnet | true"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0


@pytest.mark.ray
def test_ray_data_prepares_the_same_shards(manta, tmp_path):
    assert manta("data", "prepare", "digits", "--out", tmp_path / "a")[0] == 0
    command = [sys.executable, "-m", "jobs", "data", "prepare", "digits", "--out", str(tmp_path / "b")]
    subprocess.run([*command, "--workers", "2"], check=True, capture_output=True, timeout=300)
    assert (tmp_path / "a" / "manifest.json").read_text() == (tmp_path / "b" / "manifest.json").read_text()


def test_a_value_that_cannot_be_printed_is_told_all_the_same(refused, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b'model: {kind: mlp}\ndata: {kind: digits}\noptimizer: {kind: adam, lr: "\\ud800"}\n')
    assert r"optimizer.lr: must be" in refused("show", file)

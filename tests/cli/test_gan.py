"""The command line with a GAN: train, report, generate, evaluate."""

import io
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

import cluster
from cluster.inference.generate import Generated
from cluster.runs.train import Outcome
from cluster.storage import Folder
from jobs.commands.generating import picture
from jobs.commands.progress import Progress
from tests.unit import made

SMALL = {"train.epochs": 2, "adversarial.quality.num_images": 64, "model.width": 8}


def train(recipe, run: Path, **more) -> Outcome:
    return cluster.train(recipe, run=str(run), overrides={**SMALL, "adversarial.quality.every_epochs": 1, **more})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So that figures are the same to the last bit whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("digits") / "run"
    train("digits-dcgan", run)
    return run


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("conditional") / "run"
    train("digits-dcgan", run, model={"kind": "conditional_gan", "noise_size": 8}, **{"train.epochs": 1})
    return run


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("paired") / "run"
    recipe = {
        "name": "edges",
        "model": {"kind": "pix2pix", "width": 4},
        "data": {"kind": "pairs", "edges_of": {"kind": "digits"}},
        "objective": {"kind": "adversarial", "l1_weight": 100},
        "optimizer": {"kind": "adam", "lr": 2e-4, "betas": [0.5, 0.999]},
        "train": {"global_batch_size": 256},
    }
    train(recipe, run, **{"train.epochs": 1})
    return run


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> Path:
    """A GAN of rows that are no images."""
    folder = tmp_path_factory.mktemp("points")
    recipe = {
        "model": {"kind": "gan", "noise_size": 4, "generator_hidden": [8], "discriminator_hidden": [8]},
        "data": made.features(folder / "data", 800).model_dump(),
        "objective": {"kind": "adversarial"},
    }
    overrides = {"train.epochs": 1, "adversarial.quality.num_images": 64}
    cluster.train(recipe, run=str(folder / "run"), overrides=overrides)
    return folder / "run"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


# -- train and report ----------------------------------------------------------------------------------------------


def test_training_tells_what_matters(manta, tmp_path):
    pairs = [f"--set={name}={value}" for name, value in SMALL.items()]
    pairs += [
        "--set=adversarial.quality.every_epochs=1",
        "--set=adversarial.collapse={patience: 1, max_accuracy: 0, min_diversity: 0}",
    ]
    code, out, err = manta("train", "digits-dcgan", "--run", tmp_path / "run", *pairs, "--set=train.epochs=12")
    assert code == 0
    lines = err.splitlines()
    assert any(line.startswith("untrained    validation Frechet ") for line in lines)
    told = next(line for line in lines if re.match(r"epoch +1/12 +train ", line))
    assert [word for word in told.split() if word.isalpha()] == [
        "epoch", "train", "generator", "discriminator", "right", "on", "real", "on", "made",
    ]  # fmt: skip
    assert max(map(len, (line for line in lines if line.startswith("epoch")))) < 110
    warnings = [line for line in lines if line.startswith("WARNING: step ")]
    assert len(warnings) == 4
    assert "both halves return to their best" in warnings[0]
    assert "the discriminator told" in warnings[0]
    assert "training ends here" in warnings[3]
    figures = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert float(figures["test/frechet_distance"]) > float(figures["test/frechet_floor"])
    assert re.fullmatch(r"3, the last at step \d+0", figures["rollbacks"])
    assert "ended early" in out
    assert "after 3 of 3 rollbacks" in out
    starts = {len(line) - len(line.partition("  ")[2].lstrip()) for line in out.splitlines()}
    assert len(starts) == 1  # one column of values

    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("Training ended early:", "Rollbacks", "Samples over time", "What it makes", "Frechet distance"):
        assert text in page, text
    assert "Not on this page" not in page
    assert "Confusion" not in page


def test_a_finished_run_has_nothing_to_explain(manta, digits, capsys):
    code, out, _ = manta("train", digits / "recipe.yaml", "--run", digits, "--resume")
    assert code == 0
    assert "rollbacks" not in out
    assert "ended early" not in out
    assert manta("report", digits)[0] == 0
    page = (digits / "report.html").read_text()
    assert "Training ended early" not in page
    assert "Not on this page" not in page
    assert page.count("data:image/png") == 4  # the best one large, and three looks


def test_a_warning_is_shown_on_what_standard_error_is_then(manta, capsys, monkeypatch):
    manta("models")
    elsewhere = io.StringIO()  # as a progress bar puts there
    monkeypatch.setattr("sys.stderr", elsewhere)
    logging.getLogger("cluster.anything").warning("collapsed")
    logging.getLogger("theirs").warning("not ours")
    assert elsewhere.getvalue() == "WARNING: collapsed\n"


def test_the_bar_fits_a_narrow_terminal(monkeypatch):
    seen = io.StringIO()
    monkeypatch.setattr("jobs.commands.progress.Console", lambda **_: Console(file=seen, force_terminal=True, width=80))
    look = {"step": 0, "epoch": 0, "split": "validation", "frechet_distance": 168.62, "frechet_floor": 3.7}
    losses = {"step": 9, "epoch": 0, "split": "train", "generator_loss": 0.6542, "discriminator_loss": 1.25}
    with Progress("digits-dcgan", epochs=4) as progress:
        progress({**look, "diversity": 0.5, "time_s": 1.0})
        progress({**losses, "end_of_epoch": True, "time_s": 2.0})
    assert "Frechet 168.6  losses 0.654 / 1.250" in seen.getvalue()


def test_show(manta):
    code, out, _ = manta("show", "digits-dcgan")
    assert code == 0
    assert "generator." in out
    assert "discriminator." in out
    assert "adversarial:" in out
    assert "20 an epoch" in out


# -- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "conditional", "paired", "points"])
def test_evaluate_repeats_the_figures(manta, request, name):
    run = request.getfixturevalue(name)
    code, out, err = manta("evaluate", run, "--json")
    assert code == 0, err
    result = json.loads((run / "result.json").read_text())
    tested = {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
    assert json.loads(out)["metrics"] == tested
    assert {"test/diversity", "test/frechet_distance", "test/frechet_floor"} <= set(tested)
    assert ("test/label_agreement" in tested) == (name == "conditional")
    assert ("test/l1" in tested) == (name == "paired")
    assert json.loads(out)["rows"] == 64


def test_evaluate_refuses_rows_that_do_not_fit(manta, refused, digits, paired, tmp_path):
    larger = "{kind: digits, image_size: [16, 16]}"
    message = refused("evaluate", digits, "--data", larger)
    assert "the rows of digits are 1 x 16 x 16 uint8, but the model of" in message
    assert "was trained on 1 x 8 x 8 uint8" in message
    assert "but the model of" in refused("evaluate", paired, "--data", larger)  # no pairs
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, format="PNG")
    rows = {"image": [buffer.getvalue()] * 20, "label": [str(row % 10) for row in range(20)]}
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    other = f"{{kind: pairs, path: {tmp_path}/pairs.parquet, condition: image, input: image, target: label, "
    other += "image_shape: [1, 8, 8], condition_channels: 3}"  # the images to start from are in colour
    message = refused("evaluate", paired, "--data", other)
    assert "are 3 x 8 x 8 -> 1 x 8 x 8 uint8, but the model of" in message
    assert "was trained on 1 x 8 x 8 -> 1 x 8 x 8 uint8" in message


def test_evaluate_needs_training_rows_to_compare_with(manta, refused, digits, tmp_path):
    assert manta("data", "prepare", "digits", "--out", tmp_path / "data")[0] == 0
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    del manifest["splits"]["train"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert "has no training rows" in refused("evaluate", digits, "--data", tmp_path / "data")


# -- generate ------------------------------------------------------------------------------------------------------


def test_generate(manta, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert manta("generate", digits) == (0, f"{tmp_path}/samples.png\n", "")
    first = pixels(tmp_path / "samples.png")
    assert first.shape == (8 * 34 + 2, 8 * 34 + 2)  # 64 digits of 8 x 8, each pixel 4 x 4
    assert manta("generate", digits, "--seed", 1, "--out", tmp_path / "other.PNG")[0] == 0
    assert (pixels(tmp_path / "other.PNG") != first).any()
    code, out, _ = manta("generate", digits, "--num", 5, "--json")
    assert code == 0
    assert json.loads(out) == {"path": f"{tmp_path}/samples.png", "num": 5, "seed": 0, "label": None}
    assert pixels(tmp_path / "samples.png").shape == (2 * 34 + 2, 3 * 34 + 2)
    assert (pixels(tmp_path / "samples.png")[:36, :104] == first[:36, :104]).all()  # the same noise, replaced whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.PNG", "samples.png"]


def test_the_root_of_the_disk_is_a_folder_too():
    assert Folder("/").local == Path("/")  # of /samples.png


def test_generate_the_class_asked_for(manta, conditional, tmp_path):
    out = tmp_path / "samples.png"
    assert manta("generate", conditional, "--out", out, "--num", 30)[0] == 0
    assert pixels(out).shape == (3 * 34 + 2, 10 * 34 + 2)  # a class a column
    code, text, _ = manta("generate", conditional, "--out", out, "--num", 4, "--label", 3, "--json")
    assert code == 0
    assert json.loads(text)["label"] == "3"
    assert pixels(out).shape == (2 * 34 + 2, 2 * 34 + 2)


def test_generate_from_pairs(manta, refused, paired, tmp_path):
    out = tmp_path / "samples.png"
    assert manta("generate", paired, "--out", out, "--num", 4)[0] == 0
    assert pixels(out).shape == (4 * 34 + 2, 3 * 34 + 2)
    assert "the test split has only 180 to start from" in refused("generate", paired, "--out", out, "--num", 1000)


def test_pairs_of_different_channels_are_shown_beside_each_other():
    for channels in (1, 2, 3, 4):
        given = torch.zeros(4, channels, 8, 8)
        with Image.open(io.BytesIO(picture(Generated(torch.ones(4, 3, 8, 8), given, given)))) as image:
            assert image.size == (3 * 34 + 2, 4 * 34 + 2)
            assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0"], "'--num': "),
        (["--num", "-3"], "'--num': "),
        (["--num", "1000000"], "--num: 1000000 images; at most 10,000 make one picture"),
        (["--num", "many"], "'--num': "),
        (["--seed", "-1"], "'--seed': "),
        (["--seed", str(2**70)], "'--seed': "),
        (["--out", "gone/samples.png"], "gone is not a folder; make it first"),
        (["--out", "samples.jpg"], "--out: 'samples.jpg' is not the name of a PNG file"),
        (["--out", ""], "--out: '' is not the name of a PNG file"),
        (["--out", "."], "--out: '.' is not the name of a PNG file"),
        (["--out", ".png"], "--out: '.png' is not the name of a PNG file"),
        (["--out", "folder.png"], "folder.png is a folder; give the name of a file in it"),
        (["--out", "file/samples.png"], "file is not a folder"),
        (["--out", "nowhere://x/samples.png"], "not a place that can be read or written"),
        (["--label", "3"], "--label: dcgan makes rows without labels"),
    ],
)
def test_what_generate_refuses(refused, digits, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    assert message in refused("generate", digits, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_runs_that_generate_refuses(manta, refused, digits, conditional, points, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not a run's directory" in refused("generate", "gone")
    assert "--label: 'cat' is no class of this run's data" in refused("generate", conditional, "--label", "cat")
    assert "--label: '10' is no class" in refused("generate", conditional, "--label", "10")
    assert "its rows are 4 numbers each, no images" in refused("generate", points)
    manta("train", "digits-mlp", "--set", "train.epochs=1", "--run", tmp_path / "mlp")
    assert "a mlp, which generates nothing; give the run of a GAN" in refused("generate", tmp_path / "mlp")
    shutil.copytree(digits, tmp_path / "begun")
    (tmp_path / "begun" / "model" / "model.safetensors").unlink()
    assert "no model here" in refused("generate", tmp_path / "begun")
    assert not (tmp_path / "samples.png").exists()

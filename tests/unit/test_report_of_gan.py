"""The report of a GAN: samples over time, quality beside its floor, rollbacks; nothing of what a GAN has not."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cluster.data.manifest import Manifest, StoredColumn
from jobs.report.samples import MAX_GRIDS, spread
from tests.unit.test_report import Page, report

RECIPE = """name: digits-dcgan
model: {kind: dcgan}
data: {kind: digits}
objective: {kind: adversarial}
optimizer: {kind: adam, lr: 0.0002}
train: {epochs: 20, global_batch_size: 64}
adversarial: {mode: exact}
"""
REASON = "the discriminator told 99.9 % of the rows apart, and more than 99.5 %, for 3 looks in a row"
ROLLBACK = {"step": 60, "to_step": 40, "reason": REASON, "learning_rate_factor": 0.5}


def lines(num_looks: int = 11, **more: Any) -> list[dict[str, Any]]:
    """A look at the untrained halves, then an epoch of ten steps and a look again and again; best at step 40."""
    found: list[dict[str, Any]] = []
    for look in range(num_looks):
        step, epoch = 10 * look, max(0, look - 1)
        if look:
            line = {"step": step, "epoch": epoch, "split": "train", "generator_loss": 0.7 + look / 10}
            line |= {"discriminator_loss": 1.3, "real_accuracy": 0.9, "fake_accuracy": 0.8}
            found += [line | {"learning_rate": 2e-4}, line | {"end_of_epoch": True, "rows_digest": "5f3a"}]
        distance = 12.5 + abs(step - 40) * 4
        line = {"step": step, "epoch": epoch, "split": "validation", "frechet_distance": distance, "diversity": 0.75}
        found.append(line | {"frechet_floor": 2.5, "kernel_distance": -0.125, "kernel_floor": -0.25, **more})
    return found


def result(**more: Any) -> dict[str, Any]:
    floors = {"frechet_floor": 2.5, "kernel_floor": -0.25}
    tested = {"frechet_distance": 13.25, "diversity": 0.5, "frechet_floor": 2.25}
    return {
        "status": "finished",
        "metrics": {"train/generator_loss": 1.7, **{f"test/{name}": value for name, value in tested.items()}},
        "best": {"metric": "validation/frechet_distance", "value": 12.5, "epoch": 3, "step": 40},
        "untrained": {"frechet_distance": 172.5, "diversity": 0.0018, **floors},
        "steps": 100, "epochs": 10, "num_workers": 0, "ended": None, "rollbacks": [], **more,
    }  # fmt: skip


def png(size: tuple[int, int] = (34, 20), *, noise: bool = False) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels if noise else pixels // 255).save(buffer, format="PNG")
    return buffer.getvalue()


def described(*, shape: tuple[int, ...] = (1, 8, 8), pairs: bool = False, version: int = 2) -> dict[str, Any]:
    """What model.safetensors says of the data: the manifest without its shards, of either version."""
    names, moments = list("0123456789"), {"mean": [0.5] * shape[0], "std": [0.25] * shape[0]}
    if version == 1:
        old = {"input_shape": shape, "input_dtype": "float32", "condition_shape": shape if pairs else None}
        target = {"target_kind": "label", "num_outputs": 10, "class_names": names}
        return {"version": 1, "source": "digits", **old, **target, **moments, "splits": {}}
    image = {"kind": "image", "shape": shape} if len(shape) == 3 else {"kind": "features", "size": shape[0]}
    columns = {"input": {"column": image, **moments}, "target": {"column": {"kind": "label", "names": names}}}
    if pairs:
        columns["condition"] = {"column": image, "dtype": "uint8", "moments": False}
    stored = {name: StoredColumn.model_validate(column) for name, column in columns.items()}
    return Manifest(source="digits", columns=stored, splits={}).model_dump(mode="json")


def write_run(
    run: Path,
    *,
    metrics: list[dict[str, Any]] | None = None,
    ends: dict[str, Any] | None = None,
    recipe: str = RECIPE,
    data: dict[str, Any] | None = None,
    picture: bytes | None = None,
) -> Path:
    metrics = lines() if metrics is None else metrics
    (run / "model").mkdir(parents=True)
    (run / "samples").mkdir()
    (run / "recipe.yaml").write_text(recipe)
    (run / "environment.json").write_text(json.dumps({"seed": 0}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (run / "result.json").write_text(json.dumps(result() if ends is None else ends))
    weights = {"generator.0.weight": np.ones((2, 1, 3, 3), np.float32)}
    save_file(weights, run / "model/model.safetensors", metadata={"data": json.dumps(data or described())})
    for line in metrics:
        if line["split"] == "validation":
            (run / f"samples/step-{line['step']:010d}.png").write_bytes(picture or png())
    return run


def headings(page: Page) -> set[str]:
    return set(page.headings)


def test_everything_that_a_gan_leaves_is_on_the_page(tmp_path: Path):
    page = report(write_run(tmp_path / "run", ends=result(rollbacks=[ROLLBACK], ended=f"{REASON}, after 1 of 1")))
    assert headings(page) >= {"What it makes", "Rollbacks", "Samples over time", "Curves"}
    assert headings(page).isdisjoint({"Not on this page", "Confusion", "Predictions", "Learned filters"})
    for words in (
        "Training ended early: the discriminator told 99.9 % of the rows apart",
        "test Frechet distance 13.25",
        "test Frechet floor 2.25",
        "best validation Frechet distance 12.5, epoch 4",
        "rollbacks 1",
        "The best generator , step 40, epoch 4; Frechet distance 12.5",
        "untrained best floor best, test split floor, test split",
        "Frechet distance 172.5 12.5 2.5 13.25 2.25",
        "diversity 0.0018 0.75 0.5",
        f"step 60 (epoch 6) step 40 (epoch 4) {REASON} 0.5",
        "6 of 11 looks",
    ):
        assert words in page.words, words
    samples = [text for text in page.alternatives if text.startswith("Samples")]
    assert samples == [
        "Samples, step 40, epoch 4: Frechet distance 12.5",
        "Samples, untrained: Frechet distance 172.5",
        "Samples, step 20, epoch 2: Frechet distance 92.5",
        "Samples, step 40, epoch 4: Frechet distance 12.5",
        "Samples, step 60, epoch 6: Frechet distance 92.5",
        "Samples, step 80, epoch 8: Frechet distance 172.5",
        "Samples, step 100, epoch 10: Frechet distance 252.5",
    ]


def test_the_curves_of_a_game(tmp_path: Path):
    page = report(write_run(tmp_path / "run", ends=result(rollbacks=[ROLLBACK])))
    charts = [text.replace("\u202f", " ") for text in page.alternatives if " by epoch: " in text]
    assert charts[:4] == [
        "loss by epoch: generator from 0.8 to 1.7; discriminator from 1.3 to 1.3",
        "discriminator accuracy by epoch: on real rows from 90.00 % to 90.00 %; on made rows from 80.00 % to 80.00 %",
        "Frechet distance by epoch: validation from 172.5 to 252.5; floor, validation 2.5",
        "kernel distance by epoch: validation from -0.125 to -0.125; floor, validation -0.25",
    ]
    assert not any("floor by" in text for text in charts)
    assert page.words.count(f"rollback at step 60: {REASON}") == len(charts)
    assert "Red: rollbacks." in page.words
    assert "Red: rollbacks." not in report(write_run(tmp_path / "other")).words


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_conditional_and_a_paired_grid_show(tmp_path: Path, version: int):
    conditional = RECIPE.replace("dcgan}", "conditional_gan}")
    data = described(version=version)
    page = report(write_run(tmp_path / "a", recipe=conditional, metrics=lines(label_agreement=0.9), data=data))
    assert "The classes from left to right: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in page.words
    assert "label agreement 90.00 %" in page.words
    paired = described(pairs=True, version=version)
    page = report(write_run(tmp_path / "b", metrics=lines(l1=0.25), data=paired))
    assert "In each row, twice: the image given, what was made from it, and the true one." in page.words
    assert "L1 0.25" in page.words


def test_a_description_of_the_data_that_is_none(tmp_path: Path):
    page = report(write_run(tmp_path / "run", data={"input_shape": "wide"}))
    assert "The best generator's weights: model/model.safetensors cannot be read (UserError: data" in page.words
    assert {"What it makes", "Samples over time"} <= headings(page)


@pytest.mark.parametrize("version", [1, 2])
def test_rows_that_are_no_images(tmp_path: Path, version: int):
    run = write_run(tmp_path / "run", data=described(shape=(4,), version=version))
    for picture in (run / "samples").iterdir():
        picture.unlink()
    page = report(run)
    assert page.addresses == []
    assert headings(page).isdisjoint({"Not on this page", "Samples over time"})
    assert "Frechet distance 172.5 12.5" in page.words


def test_a_run_that_goes_on_shows_the_best_so_far(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "result.json").unlink()
    page = report(run)
    assert "The best generator , step 40, epoch 4" in page.words
    assert "untrained best floor Frechet distance 172.5 12.5 2.5" in page.words
    assert "unfinished" in page.words


def test_a_best_generator_that_was_never_trained(tmp_path: Path):
    best = {"metric": "validation/frechet_distance", "value": 172.5, "epoch": 0, "step": 0}
    page = report(write_run(tmp_path / "run", ends=result(best=best, rollbacks=[{**ROLLBACK, "to_step": 0}])))
    assert "best validation Frechet distance 172.5, untrained" in page.words
    assert "The best generator , untrained; Frechet distance 172.5" in page.words
    assert "step 60 (epoch 6) the untrained halves" in page.words


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "enormous"])
def test_a_broken_picture_costs_only_itself(tmp_path: Path, damage: str):
    run = write_run(tmp_path / "run")
    whole = png(noise=True)
    enormous = whole[:16] + (60_000).to_bytes(4) * 2 + whole[24:]
    content = {"empty": b"", "garbage": b"\x89PNG\r\n" * 9, "cut": whole[: len(whole) // 2], "enormous": enormous}
    (run / "samples/step-0000000060.png").write_bytes(content[damage])
    page = report(run)
    assert len([text for text in page.alternatives if text.startswith("Samples")]) == 6
    assert "A picture: samples/step-0000000060.png cannot be read (ValueError" in page.words


def test_missing_pictures(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "samples/step-0000000040.png").unlink()
    (run / "samples/notes.txt").write_text("mine")
    page = report(run)
    assert "The best generator's samples: samples/ has no picture of its step." in page.words
    assert "Samples over time" in page.headings
    for picture in (run / "samples").iterdir():
        picture.unlink()
    page = report(run)
    assert "The samples: the run has no pictures in samples/." in page.words
    assert "Samples over time" not in page.headings
    assert "What it makes" in page.headings  # its figures


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "metrics.jsonl", "result.json",
                                  "model/model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("damage", ["missing", "garbage", "list"])
def test_a_missing_or_broken_file_costs_only_its_own_part(tmp_path: Path, name: str, damage: str):
    run = write_run(tmp_path / "run")
    if damage == "missing":
        (run / name).unlink()
    else:
        (run / name).write_bytes(b"\xff{]\n: [" * 40 if damage == "garbage" else b"[1, {}]")
    page = report(run)
    assert {"What it makes", "Samples over time"} <= headings(page)
    assert headings(page).isdisjoint({"Confusion", "Predictions", "Learned filters"})
    assert "The predictions" not in page.words


def test_figures_that_are_no_figures(tmp_path: Path):
    metrics = [*lines(3), {"step": 30, "split": "validation", "frechet_distance": None, "frechet_floor": "low"}]
    odd = result(rollbacks=[1, None, {"step": None}, {"step": 20}, {**ROLLBACK, "reason": "<b>"}], untrained=[3])
    odd |= {"best": {"step": "forty", "value": None}, "ended": 7, "metrics": {"test/frechet_distance": None}}
    page = report(write_run(tmp_path / "run", metrics=metrics, ends=odd))
    assert "Training ended early" not in page.words
    assert "<b>" in page.words
    assert {"Rollbacks", "Curves"} <= headings(page)


def test_rollbacks_of_another_kind_of_mapping(tmp_path: Path):
    page = report(write_run(tmp_path / "run", ends=result(rollbacks="three", best="none")))
    assert "Rollbacks" not in page.headings


def test_large_pictures_are_made_smaller(tmp_path: Path):
    run = write_run(tmp_path / "run", metrics=lines(40), picture=png((1400, 700), noise=True))
    page = report(run)
    assert len(page.addresses) == 7
    assert all(address.startswith("data:image/jpeg") for address in page.addresses)
    assert (run / "report.html").stat().st_size < 7 * 600_000


@pytest.mark.parametrize("num_steps", [1, 2, 6, 7, 30, 1000])
@pytest.mark.parametrize("best", [None, 0, 1, 5, 17, 999])
def test_grids_are_spread_over_training(num_steps: int, best: int | None):
    steps = list(range(0, num_steps * 10, 10))
    best = None if best is None or best >= num_steps else best * 10
    chosen = spread(steps, best)
    assert len(chosen) == min(num_steps, MAX_GRIDS)
    assert chosen == sorted(set(chosen))
    assert {steps[0], steps[-1]} <= set(chosen)
    assert best is None or best in chosen

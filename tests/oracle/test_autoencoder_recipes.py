"""What the recipes of autoencoders come to: beside PCA, the noisy row, and each other. Minutes, but for digits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cluster
from cluster.data.prepare import prepared
from cluster.data.rows import table_rows
from cluster.inference.evaluate import evaluate_run
from cluster.recipe.loading import load_recipe
from nn_models.autoencoder import principal_angles

PLAIN = {"objective": {"kind": "reconstruction"}}


def trained(name: str, folder: Path, **changes):
    recipe = load_recipe(name, {path.replace("__", "."): value for path, value in changes.items()})
    return cluster.train(recipe, run=str(folder), num_workers=0)


def test_digits_by_way_of_8_numbers_are_better_than_pca(tmp_path):
    metrics = trained("digits-autoencoder", tmp_path / "run").metrics
    assert metrics["test/mse"] < 0.85 * metrics["test/pca_mse"]


def test_digits_have_a_bound_that_many_samples_tighten(tmp_path):
    metrics = trained("digits-vae", tmp_path / "run", train__epochs=15, objective__samples=10).metrics
    assert metrics["test/negative_bound"] < metrics["test/negative_elbo"] < 27.5


@pytest.mark.slow
def test_fashion_linear_is_pca(tmp_path):
    whole = trained("fashion-linear-autoencoder", tmp_path / "32")
    assert whole.metrics["test/mse"] == pytest.approx(0.015142, rel=5e-3)
    few = trained("fashion-linear-autoencoder", tmp_path / "8", model__code=8)
    decoder = load_file(f"{few.run}/model/model.safetensors")["decoder.0.linear.weight"]
    components = load_file(f"{few.run}/evaluation.safetensors")["pca.components"]
    assert principal_angles(decoder, components.T)[0] < 2
    for run in (whole, few):
        pca = load_file(f"{run.run}/evaluation.safetensors")
        data = prepared(load_recipe("fashion-linear-autoencoder").data)
        rows = torch.from_numpy(table_rows(data.table("train"), data.manifest).columns["input"].values).flatten(1)
        rows = rows / 255 - pca["pca.mean"]
        best = (rows - rows @ pca["pca.components"].T @ pca["pca.components"]).square().mean().item()
        ours = evaluate_run(run.run, split="train")["metrics"]["train/mse"]
        assert ours >= best * (1 - 1e-5)  # nothing linear is better on the rows it is fitted to; float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-autoencoder", "fashion-conv-autoencoder"])
def test_fashion_nonlinear_is_better_than_pca(name, tmp_path):
    metrics = trained(name, tmp_path / "run").metrics
    assert metrics["test/mse"] < 0.72 * metrics["test/pca_mse"]


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "level"), [("gaussian", 0.3), ("masking", 0.5), ("salt_and_pepper", 0.3)])
def test_fashion_denoising_is_better_than_pca_and_the_noisy_row(noise, level, tmp_path):
    metrics = trained("fashion-denoising", tmp_path / "run", objective__noise=noise, objective__level=level).metrics
    assert metrics["test/mse"] < metrics["test/pca_mse"] < metrics["test/identity_mse"]


@pytest.mark.slow
def test_fashion_sparse_is_as_sparse_as_asked_for(tmp_path):
    metrics = trained("fashion-sparse", tmp_path / "run").metrics
    assert metrics["test/mean_activation"] == pytest.approx(0.05, rel=0.1)


@pytest.mark.slow
def test_fashion_contractive_codes_move_less(tmp_path):
    runs = [
        trained("fashion-contractive", tmp_path / "ours"),
        trained("fashion-contractive", tmp_path / "plain", **PLAIN),
    ]
    rows = load_file(f"{runs[0].run}/evaluation.safetensors")["example_inputs"].float() / 255
    noisy = rows + 0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    moved = []
    for run in runs:
        net = cluster.open_model(run.run).net
        with torch.no_grad():
            moved.append((net.encode(noisy) - net.encode(rows)).norm(dim=1).mean().item())
    assert moved[0] < 0.8 * moved[1]


@pytest.mark.slow
def test_fashion_vae_reaches_243_nats(tmp_path):
    metrics = trained("fashion-vae", tmp_path / "run").metrics
    assert metrics["test/negative_bound"] < metrics["test/negative_elbo"] <= 243

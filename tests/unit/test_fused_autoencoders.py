"""Fused trials of dense autoencoders: each has the figures that it would have alone."""

import numpy as np
import pytest
import torch

from cluster.data.prepare import prepared
from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from cluster.training.context import LocalContext
from cluster.training.loop import fit
from cluster.training.run_directory import RunDirectory, read_metrics
from cluster.training.splits import open_splits
from cluster.tuning.fused.groups import groups, why_not
from cluster.tuning.fused.loop import FusedLoop

CPU = torch.device("cpu")
DENSE = {"kind": "autoencoder", "hidden": [12], "code": 5, "code_activation": "sigmoid"}
CASES = {
    "rates": ({"kind": "reconstruction"}, [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.02}]),
    "bce": ({"kind": "reconstruction", "loss": "bce"}, [{"optimizer.lr": 0.1}, {"train.seed": 3}]),
    "sparse": (
        {"kind": "sparse"},
        [{"objective.rho": 0.1}, {"objective.rho": 0.3, "objective.weight": 0.02}, {"optimizer.lr": 0.02}],
    ),
    "l1": ({"kind": "sparse", "penalty": "l1"}, [{"objective.weight": 0.01}, {"objective.weight": 0.001}]),
    "gaussian": ({"kind": "denoising"}, [{"objective.level": 0.1}, {"objective.level": 0.5}]),
    "masking": ({"kind": "denoising", "noise": "masking"}, [{"objective.level": 0.2}, {"objective.level": 0.4}]),
    "salt": ({"kind": "denoising", "noise": "salt_and_pepper"}, [{"objective.level": 0.2}, {"optimizer.lr": 0.05}]),
    "contractive": ({"kind": "contractive"}, [{"objective.weight": 0.1}, {"objective.weight": 0.01}]),
}
VAE = {"kind": "vae", "hidden": [12], "code": 3}
CASES["elbo"] = ({"kind": "variational", "samples": 0}, [{"objective.beta": 0.5}, {"objective.beta": 4.0}])
CASES["free"] = ({"kind": "variational", "samples": 0, "free_bits": 0.1}, [{"optimizer.lr": 0.001}, {}])
BESIDE = {"time_s", "rows_per_s"}


def recipes(case):
    objective, changes = CASES[case]
    content = {
        "model": VAE if objective["kind"] == "variational" else DENSE,
        "data": {"kind": "digits"},
        "objective": objective,
        "optimizer": {"kind": "sgd", "lr": 0.002 if objective["kind"] == "variational" else 0.1, "momentum": 0.5},
        "train": {"epochs": 2, "global_batch_size": 250, "log_every_steps": 1},
    }
    return [load_recipe(content, overrides=change) for change in changes]


def figures(run):
    return [
        {name: value for name, value in line.items() if name not in BESIDE} for line in read_metrics(RunDirectory(run))
    ]


def weights(run):
    state = Checkpoints(run / "checkpoints", keep=1).newest()
    assert state is not None
    return state["model"]


@pytest.mark.parametrize("case", CASES)
def test_fused_trials_come_to_what_each_comes_to_alone(case, tmp_path):
    trials = recipes(case)
    splits = open_splits(prepared(trials[0].data), window=None)
    assert groups(trials, manifest=splits.manifest) == [list(range(len(trials)))]
    together = [Folder(tmp_path / f"together-{number}").create() for number in range(len(trials))]
    with FusedLoop(trials, splits=splits, runs=together, device=CPU) as loop:
        while not loop.ended:
            loop.epoch()
        results = loop.conclude()
    for number, trial in enumerate(trials):
        alone = Folder(tmp_path / f"alone-{number}").create()
        wanted = fit(trial, context=LocalContext(run=alone, splits=splits, device=CPU))
        close = {"rtol": 1e-4, "atol": 1e-6}  # float32 sums in another order, 12 steps
        for ours, own in zip(figures(together[number]), figures(alone), strict=True):
            assert ours.keys() == own.keys()
            for name, value in own.items():
                if isinstance(value, float):
                    np.testing.assert_allclose(ours[name], value, err_msg=name, **close)
                else:
                    assert ours[name] == value
        for name, weight in weights(alone).items():
            torch.testing.assert_close(weights(together[number])[name], weight, rtol=1e-4, atol=1e-5)  # the same
        tested = {name: value for name, value in wanted["metrics"].items() if name.startswith("test/")}
        assert {name: results[number]["metrics"][name] for name in tested} == pytest.approx(tested, rel=1e-4)


def test_trials_of_several_seeds_draw_other_noise_and_are_not_fused():
    denoising = [recipes("gaussian")[0], load_recipe(recipes("gaussian")[0].model_dump(), {"train.seed": 1})]
    assert groups(denoising, manifest=prepared(denoising[0].data).manifest) == [[0], [1]]


def test_what_is_not_fused_says_so():
    convolutional = {"kind": "conv_autoencoder", "channels": [3], "code": 5}
    trial = load_recipe({"model": convolutional, "data": {"kind": "digits"}, "objective": {"kind": "reconstruction"}})
    reason = why_not(trial, prepared(trial.data).manifest)
    assert reason is not None
    assert str(reason) == "model.kind: conv_autoencoder: no batch of such models is known"

"""The toy chapter on no, one and two ranks: the same rows, the same figures, resumed in mid-epoch bit for bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.data.prepare import prepared
from cluster.recipe.fit import check
from cluster.runs.summary import summarise
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from nn_models.errors import UserError
from tests.toy.chapter import TOY, ToyRecipe

WORLDS = (0, 1, 2)
SAVING = {"checkpoint_every_steps": 2, "keep_checkpoints": 1}


def recipe(**train: Any) -> dict[str, Any]:
    return TOY | {"train": TOY["train"] | train}


def run(jobs: list[dict[str, Any]]) -> list[list[int]]:
    """The exit codes of each job's ranks."""
    jobs = [{"class": "tests.toy.chapter:ToyRecipe", **job} for job in jobs]
    line = [sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)]
    process = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def lines(path: Path, split: str = "train") -> list[dict[str, Any]]:
    found = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


def digests(path: Path) -> list[str]:
    return [line["rows_digest"] for line in lines(path) if "rows_digest" in line]


def figures(path: Path, split: str = "train") -> np.ndarray:
    names = ("loss", "token_accuracy", "first_accuracy")
    return np.array([[line[name] for name in names] for line in lines(path, split)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = Checkpoints(Folder(path / "checkpoints"), keep=1).newest()
    assert state is not None
    return state["model"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[Any, Path]:
    """Undisturbed runs, by the number of ranks; "pieces" is one in two pieces a step."""
    folder = tmp_path_factory.mktemp("whole")
    jobs = [{"recipe": recipe(**SAVING), "world_size": ranks, "run": str(folder / str(ranks))} for ranks in WORLDS]
    jobs.append({"recipe": recipe(accumulation=2), "world_size": 0, "run": str(folder / "pieces")})
    assert all(code == 0 for codes in run(jobs) for code in codes)
    return {ranks: folder / str(ranks) for ranks in (*WORLDS, "pieces")}


def test_every_number_of_ranks_sees_the_same_rows_and_comes_to_the_same_figures(whole):
    assert len(digests(whole[0])) == TOY["train"]["epochs"]
    for ranks in WORLDS[1:]:
        assert digests(whole[ranks]) == digests(whole[0])
        for split in ("train", "validation"):
            # float32 sums in another order, over 27 steps with momentum
            np.testing.assert_allclose(figures(whole[ranks], split), figures(whole[0], split), rtol=2e-4)
    assert np.array_equal(figures(whole[1]), figures(whole[0]))  # one rank does the same in the same order
    # 8 of 72 windows a step
    assert len(lines(whole[0])) == 3 * (9 + 1)


def test_what_counts_is_tokens_and_not_rows(whole):
    data = prepared(ToyRecipe.model_validate(recipe()).data)
    order = np.diff(np.concatenate([[0], np.cumsum(data.lengths("train", "input"))]))
    assert order.sum() != 8 * len(order)
    # the mean over an epoch is that over its tokens, not of its steps' means
    steps = [line for line in lines(whole[0]) if not line.get("end_of_epoch") and line["epoch"] == 0]
    epoch = next(line for line in lines(whole[0]) if line.get("end_of_epoch"))
    windows = np.arange(72).reshape(8, 9)  # stream by stream
    tokens = data.lengths("train", "input")[windows].sum(0)
    assert epoch["token_accuracy"] == pytest.approx(np.average([s["token_accuracy"] for s in steps], weights=tokens))
    assert epoch["first_accuracy"] == pytest.approx(np.mean([s["first_accuracy"] for s in steps]))


def test_pieces_change_only_what_a_batch_has_in_common(whole):
    assert digests(whole["pieces"]) == digests(whole[0])
    # the state is carried through pieces; the penalty is on the mean of a piece, so figures are near but not equal
    np.testing.assert_allclose(figures(whole["pieces"])[:, 0], figures(whole[0])[:, 0], rtol=0.2)


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("step", [4, 13])  # in mid-epoch, of the first and the second
def test_killed_in_mid_epoch_and_resumed_it_ends_bit_for_bit_the_same(ranks, step, whole, tmp_path):
    job = {"recipe": recipe(**SAVING), "world_size": ranks, "run": str(tmp_path)}
    killed, resumed = run([{**job, "dies_at": step}, job])
    assert set(killed) == {9}
    assert set(resumed) == {0}
    assert digests(tmp_path) == digests(whole[ranks])
    assert np.array_equal(figures(tmp_path), figures(whole[ranks]))
    assert np.array_equal(figures(tmp_path, "validation"), figures(whole[ranks], "validation"))
    mine, other = weights(tmp_path), weights(whole[ranks])
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize(("first", "then"), [(2, 0), (0, 2), (1, 2)])
def test_resumed_on_another_number_of_ranks_it_goes_on_with_the_same_rows(first, then, whole, tmp_path):
    job = {"recipe": recipe(**SAVING), "run": str(tmp_path)}
    killed, resumed = run([{**job, "world_size": first, "dies_at": 13}, {**job, "world_size": then}])
    assert set(killed) == {9}
    assert set(resumed) == {0}
    assert digests(tmp_path) == digests(whole[0])
    np.testing.assert_allclose(figures(tmp_path), figures(whole[0]), rtol=2e-4)  # float32 sums in another order


def test_it_learns_what_lies_in_windows_before(whole):
    first, *_, last = (line["loss"] for line in lines(whole[0]) if line.get("end_of_epoch"))
    assert last < first


def test_show_rehearses_it_and_other_data_is_refused():
    described = ToyRecipe.model_validate(recipe())
    manifest = prepared(described.data).manifest
    check(described, manifest)
    model = described.model.build(manifest.signature)
    assert summarise(described, manifest).num_parameters == sum(p.numel() for p in model.parameters())
    digits = ToyRecipe.model_validate({**TOY, "data": {"kind": "digits"}})
    with pytest.raises(UserError, match="toy_objective needs labels to predict, but digits has a label"):
        check(digits, prepared(digits.data).manifest)

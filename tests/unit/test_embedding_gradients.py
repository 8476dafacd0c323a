"""Gradients of embeddings that hold only the rows that were used: the same steps as whole ones, at less cost."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cluster.recipe.loading import load_recipe
from cluster.storage import Folder
from cluster.training.checkpoints import Checkpoints
from cluster.training.gradients import FEWEST_ROWS, clip, touch_only_used_rows

CPU = torch.device("cpu")
ROWS, WIDTH = FEWEST_ROWS, 4
PLAIN = {"model": {"kind": "mlp"}, "data": {"kind": "digits"}}


class Net(nn.Module):
    def __init__(self, *, rows: int = ROWS, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(rows, WIDTH)
        self.output = nn.Linear(WIDTH, rows if tied else 3)
        if tied:
            self.output.weight = self.words.weight

    def forward(self, words):
        return self.output(self.words(words).mean(1))


def recipe(optimizer, **fields):
    return load_recipe({**PLAIN, "optimizer": optimizer, **fields})


ADAGRAD, SGD = {"kind": "adagrad", "lr": 0.1}, {"kind": "sgd", "lr": 0.5}


@pytest.mark.parametrize("optimizer", [ADAGRAD, SGD])
@pytest.mark.parametrize("max_norm", [None, 0.05, 50.0])
def test_steps_are_those_of_whole_gradients(optimizer, max_norm):
    nets = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = Net().double()
        if sparse:
            touch_only_used_rows(net, recipe(optimizer), device=CPU)
        assert net.words.sparse == sparse
        build, norms = recipe(optimizer).optimizer.build(net.parameters()), []
        for step in range(5):
            words = torch.randint(20, (6, 7), generator=torch.Generator().manual_seed(step))  # some several times
            build.zero_grad()
            for part in words.chunk(2):  # gradients of two pieces add up
                F.cross_entropy(net(part), part[:, 0] % 3, reduction="sum").backward()
            if max_norm:
                norms.append(clip([*net.parameters()], max_norm).item())
            assert net.words.weight.grad.is_sparse == sparse
            build.step()
        nets.append((net, norms))
    (ours, norms), (whole, others) = nets
    assert norms == pytest.approx(others)
    for mine, other in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)  # float64, sums in another order


def test_a_clipped_norm_is_that_of_torch():
    torch.manual_seed(0)
    net = Net()
    net(torch.tensor([[1, 1, 2]])).sum().backward()
    norm = clip([*net.parameters()], 0.1)
    assert norm > 0.1
    found = nn.utils.get_total_norm([parameter.grad for parameter in net.parameters()])
    assert found.item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "net"),
    [
        ({"kind": "adam"}, {}),  # its averages go on where a row has no gradient
        ({"kind": "adamw"}, {}),
        ({"kind": "rmsprop"}, {}),
        ({**SGD, "momentum": 0.9}, {}),
        ({**SGD, "weight_decay": 0.1}, {}),
        ({**ADAGRAD, "weight_decay": 0.1}, {}),
        (ADAGRAD, {"tied": True}),  # the output's gradient has all rows
        (ADAGRAD, {"rows": FEWEST_ROWS - 1}),
    ],
)
def test_whole_gradients_where_rows_without_one_move_or_all_have_one(optimizer, net):
    model = Net(**net)
    touch_only_used_rows(model, recipe(optimizer), device=CPU)
    assert not model.words.sparse


def test_whole_gradients_where_the_optimizer_changes_later_and_on_a_gpu():
    later = recipe(SGD, changes=[{"epoch": 1, "set": {"optimizer.momentum": 0.5}}])
    model = Net()
    touch_only_used_rows(model, later, device=CPU)
    touch_only_used_rows(model, recipe(SGD), device=torch.device("cuda"))
    assert not model.words.sparse


def test_ranks_average_only_the_rows_that_were_used(tmp_path):
    """Two ranks, whose slices have other words, come to what one does, and resume bit for bit."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number % 1500} of {number * 7 % 1100}" for number in range(1600)))
    train = {"epochs": 1, "global_batch_size": 8, "clip_norm": 0.5, "checkpoint_every_steps": 3, "log_every_steps": 1}
    job = {
        "recipe": {
            "model": {"kind": "rnn", "hidden": 6, "embedding": 5},
            "data": {"kind": "text", "path": str(text), "unit": "words", "window": 12},
            "objective": {"kind": "next_token"},
            "optimizer": ADAGRAD,
            "train": train,
        }
    }
    jobs = [{**job, "run": str(tmp_path / str(world)), "world_size": world} for world in (0, 2)]
    again = {**job, "run": str(tmp_path / "again"), "world_size": 2}
    jobs += [{**again, "dies_at": 5}, again]
    line = [sys.executable, "-m", "tests.unit.ranks", json.dumps(jobs)]
    output = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert [set(codes) for codes in json.loads(output.splitlines()[-1])] == [{0}, {0}, {9}, {0}]
    alone, both, resumed = (
        Checkpoints(Folder(tmp_path / name / "checkpoints"), keep=1).newest()["model"] for name in ("0", "2", "again")
    )
    for name, weights in alone.items():
        # float32 sums in another order; Adagrad's first step of a weight hangs on its gradient's sign
        torch.testing.assert_close(both[name], weights, atol=1e-4, rtol=1e-3)
        assert torch.equal(resumed[name], both[name])

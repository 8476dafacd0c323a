"""What models go by, against scikit-learn's permutation importance and occlusion written out with NumPy."""

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.inspection import permutation_importance as by_sklearn
from sklearn.metrics import r2_score

from nn_models.batch import Batch, Place
from nn_models.classification import Classification
from nn_models.columns import Features, Image, Label, Numbers
from nn_models.explaining import explainable_images, explainable_rows, occlusion, permutation_importance, places, spread
from nn_models.regression import Regression
from nn_models.signature import Signature

ROWS, FEATURES, REPEATS = 120, 5, 4


class Fitted(BaseEstimator):
    """What scikit-learn takes for an estimator that has been fitted."""

    def __init__(self, model=None):
        self.model = model

    def fit(self, x, y):
        return self

    def __sklearn_is_fitted__(self):
        return True

    def predict(self, x):
        outputs = self.model(torch.from_numpy(x)).detach().numpy()
        return outputs.argmax(1) if isinstance(self, ClassifierMixin) else outputs


class FittedClassifier(ClassifierMixin, Fitted):
    pass


class FittedRegressor(RegressorMixin, Fitted):
    pass


def shuffles_of_sklearn(seed: int) -> torch.Tensor:
    """The orders in which it takes a feature's rows, the same for all features: each is of the order before."""
    random = np.random.RandomState(np.random.RandomState(seed).randint(np.iinfo(np.int32).max + 1))
    shuffle, order, found = np.arange(ROWS), np.arange(ROWS), []
    for _ in range(REPEATS):
        random.shuffle(shuffle)
        order = order[shuffle]
        found.append(torch.from_numpy(order))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_what_is_lost_is_what_scikit_learn_loses(kind):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, FEATURES))
    net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    outputs = net(torch.from_numpy(x)).detach().numpy()
    if kind == "classes":
        y = np.where(generator.random(ROWS) < 0.8, outputs.argmax(1), 0)
        estimator, objective = FittedClassifier(net).fit(x, y), Classification(label_smoothing=0.0)
        estimator.classes_ = np.arange(3)
        signature = Signature(columns={"input": Features(size=FEATURES), "target": Label(size=3)})
    else:
        y = outputs + generator.normal(size=outputs.shape)
        estimator, objective = FittedRegressor(net), Regression(3)
        signature = Signature(columns={"input": Features(size=FEATURES), "target": Numbers(size=3)})
    wanted = by_sklearn(estimator, x, y, n_repeats=REPEATS, random_state=0)
    targets = torch.from_numpy(y)

    def score(found):
        if kind == "classes":
            return (found.argmax(1) == targets).double().mean()
        return torch.tensor(r2_score(y, found.numpy()), dtype=torch.float64)

    rows = torch.from_numpy(x)
    _, lost = permutation_importance(net, rows, score, shuffled=shuffles_of_sklearn(0))
    np.testing.assert_allclose(lost, wanted.importances, atol=1e-12)  # float64
    batch = Batch({"input": rows, "target": targets}, Place.of(ROWS), lambda: torch.arange(ROWS))
    found = objective.inspect(net, signature, batch)
    assert float(found["importance/score"]) == pytest.approx(estimator.score(x, y), abs=1e-12)  # float64
    means = found["importance/lost"].mean(1)
    # other shuffles of the same rows: what is lost has this deviation
    spread_of_both = wanted.importances.std(1).max() * 4
    np.testing.assert_allclose(means, wanted.importances_mean, atol=spread_of_both)


def test_occlusion_is_that_of_hiding_each_part_by_hand():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(3 * 10 * 7, 4)
    )
    images = torch.rand(3, 2, 12, 9)
    predicted, maps = occlusion(net, images)
    (height, tops), (width, lefts) = places(12), places(9)
    assert (height, tops[0], tops[-1], len(tops)) == (3, 0, 9, 8)
    assert (width, lefts) == (2, list(range(8)))
    with torch.no_grad():
        chances = net(images).softmax(1)
        assert torch.equal(predicted, chances.argmax(1))
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                hidden = images.numpy().copy()
                for each in hidden:
                    for channel in each:
                        channel[top : top + height, left : left + width] = channel.mean()
                lost = (chances - net(torch.from_numpy(hidden)).softmax(1)).gather(1, predicted[:, None])[:, 0]
                torch.testing.assert_close(maps[:, row, column], lost, atol=1e-6, rtol=0)  # float32
    pixels = spread(maps, (12, 9))
    covering = [
        maps[:, row, column]
        for row, top in enumerate(tops)
        for column, left in enumerate(lefts)
        if top <= 5 < top + height and left <= 4 < left + width
    ]
    torch.testing.assert_close(pixels[:, 5, 4], torch.stack(covering).mean(0), atol=1e-6, rtol=0)  # float32


def test_a_model_that_looks_at_one_part_goes_by_that_part():
    def net(images):
        return torch.stack((images[:, 0, :2, :2].sum((1, 2)), torch.full((len(images),), 1.0)), 1)

    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, :2, :2] = 1
    predicted, maps = occlusion(net, images)
    pixels = spread(maps, (8, 8))[0]
    assert predicted.tolist() == [0]
    assert pixels[:2, :2].min() > 0.1
    assert pixels[3:].abs().max() == pixels[:, 3:].abs().max() == 0


@pytest.mark.parametrize("size", range(1, 40))
def test_places_cover_the_whole_side(size):
    patch, starts = places(size)
    covered = {pixel for start in starts for pixel in range(start, start + patch)}
    assert covered == set(range(size))
    assert len(starts) <= 8


def test_what_is_too_large_is_not_explained():
    assert explainable_images((1, 28, 28)) == 16
    assert 0 < explainable_images((3, 227, 227)) < 16
    assert explainable_images((3, 1000, 1000)) == 0
    assert explainable_rows(30) == 1000
    assert explainable_rows(100_000) == 0
    objective, batch = Classification(label_smoothing=0.0), Batch({}, Place.of(1), lambda: torch.zeros(1))
    for column in (Image(shape=(3, 1000, 1000)), Features(size=100_000)):
        signature = Signature(columns={"input": column, "target": Label(size=3)})
        assert objective.inspected_rows(signature) == 1
        assert objective.inspect(None, signature, batch) == {}

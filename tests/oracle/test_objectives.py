"""Objectives against scikit-learn's metrics, SciPy, and torch's modules."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn import metrics
from torch import nn

from nn_models.batch import Batch, Place
from nn_models.classification import ClassificationSpec
from nn_models.columns import Label, Numbers
from nn_models.errors import UserError
from nn_models.evidence import confidence, confusion
from nn_models.regression import RegressionSpec
from nn_models.signature import Signature
from nn_models.spec import validate
from nn_models.zoo import AnyObjectiveSpec

ROWS, CLASSES = 50, 4


def rows(inputs, targets) -> Batch:
    return Batch({"input": inputs, "target": targets}, Place.of(len(inputs)), lambda: torch.arange(len(inputs)))


def of(spec, num_outputs):
    """The objective for so many classes, or numbers."""
    kind = Label if spec.reads["target"] == (Label,) else Numbers
    return spec.build(Signature(columns={"target": kind(size=num_outputs)}))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    return torch.randn(ROWS, CLASSES, dtype=torch.float64), torch.randint(CLASSES, (ROWS,))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy(batch, label_smoothing):
    logits, labels = batch
    objective = of(ClassificationSpec(label_smoothing=label_smoothing), CLASSES)
    loss = objective.measure(nn.Identity(), rows(logits, labels)).loss.item()

    target = (1 - label_smoothing) * np.eye(CLASSES)[labels] + label_smoothing / CLASSES  # Szegedy et al. 2016
    assert loss == pytest.approx(-(target * log_softmax(logits.numpy(), axis=1)).sum(), rel=1e-12)
    torch_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)(logits, labels).item()
    assert loss == pytest.approx(torch_loss * ROWS, rel=1e-12)
    if not label_smoothing:
        oracle = metrics.log_loss(labels, logits.softmax(1), normalize=False)
        assert loss == pytest.approx(oracle, rel=1e-12)


def test_classification_metrics(batch):
    logits, labels = batch
    objective = of(ClassificationSpec(), CLASSES)
    sums = objective.measure(nn.Identity(), rows(logits, labels)).sums
    predictions, probabilities = confidence(logits)

    assert sums.shape == (len(objective.metrics),)
    assert sums.dtype == torch.float64
    assert sums.item() == metrics.accuracy_score(labels, predictions, normalize=False)
    assert confusion(logits, labels, CLASSES).tolist() == metrics.confusion_matrix(labels, predictions).tolist()
    assert torch.equal(probabilities, logits.softmax(1)[range(ROWS), predictions])


def test_confusion_matrices_of_batches_add_up_even_without_some_classes(batch):
    logits, labels = batch
    parts = [confusion(logits[some], labels[some], CLASSES) for some in torch.arange(ROWS).split(3)]
    assert torch.equal(sum(parts), confusion(logits, labels, CLASSES))
    assert parts[0].dtype == torch.int64


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_regression(num_outputs):
    outputs, targets = torch.randn(2, ROWS, num_outputs, dtype=torch.float64)
    objective = of(RegressionSpec(), num_outputs)
    given = targets.squeeze(1) if num_outputs == 1 else targets  # a column of numbers comes as (B,)
    measured = objective.measure(nn.Identity(), rows(outputs, given))
    mse, mae = (measured.sums / ROWS).tolist()

    assert mse == pytest.approx(metrics.mean_squared_error(targets, outputs), rel=1e-12)
    assert mae == pytest.approx(metrics.mean_absolute_error(targets, outputs), rel=1e-12)
    assert measured.loss.item() / ROWS == pytest.approx(mse, rel=1e-12)


@pytest.mark.parametrize(
    ("spec", "targets"), [(ClassificationSpec(label_smoothing=0.2), [2, 0]), (RegressionSpec(), [[1.0, 2, 3]] * 2)]
)
def test_gradient_of_the_loss_equals_finite_differences(spec, targets):
    objective, targets = of(spec, 3), torch.tensor(targets)
    outputs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: objective.measure(nn.Identity(), rows(x, targets)).loss, outputs)


@pytest.mark.parametrize(
    ("spec", "targets"), [(ClassificationSpec(), torch.tensor([1, 2])), (RegressionSpec(), torch.randn(2, 3))]
)
def test_loss_is_float32_under_bfloat16_autocast(spec, targets):
    objective, model, x = of(spec, 3), nn.Linear(5, 3), torch.randn(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        measured = objective.measure(model, rows(x, targets))
    assert measured.outputs.dtype == torch.bfloat16
    assert measured.loss.dtype == torch.float32
    exact = objective.measure(nn.Identity(), rows(measured.outputs.float(), targets))
    assert torch.equal(measured.loss, exact.loss)
    assert torch.equal(measured.sums, exact.sums)


@pytest.mark.parametrize(
    ("spec", "targets"), [(ClassificationSpec(), torch.tensor([1, 2])), (RegressionSpec(), torch.randn(2, 3))]
)
def test_only_the_loss_holds_the_graph(spec, targets):
    objective = of(spec, 3)
    measured = objective.measure(nn.Linear(5, 3), rows(torch.randn(2, 5), targets))
    assert measured.loss.shape == ()
    assert measured.loss.requires_grad
    assert not measured.outputs.requires_grad
    assert not measured.sums.requires_grad


def test_regression_refuses_targets_that_would_broadcast():
    objective = of(RegressionSpec(), 3)
    with pytest.raises(RuntimeError, match="shape"):
        objective.measure(nn.Identity(), rows(torch.randn(2, 3), torch.randn(2)))


def test_one_class_is_refused():
    with pytest.raises(
        UserError, match=r"objective\.kind: classification needs at least 2 classes, but the data has 1; "
    ):
        of(ClassificationSpec(), 1)


def test_specs():
    spec = validate(AnyObjectiveSpec, {"kind": "classification", "label_smoothing": 0.1}, prefix="objective")
    assert (spec.reads["target"], RegressionSpec.reads["target"]) == ((Label,), (Numbers,))
    with pytest.raises(UserError, match=r"objective\.label_smoothing: must be less than 1, not 1"):
        validate(AnyObjectiveSpec, {"kind": "classification", "label_smoothing": 1}, prefix="objective")
    with pytest.raises(UserError, match=r"objective\.kind: unknown kind 'regresion'; did you mean regression\?"):
        validate(AnyObjectiveSpec, {"kind": "regresion"}, prefix="objective")

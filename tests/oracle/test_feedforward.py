"""The multilayer perceptron against scikit-learn's, torch.nn.functional, and the papers' initial variances."""

from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.neural_network import MLPClassifier
from torch import nn
from torch.nn import functional as F

from nn_models.activations import ACTIVATIONS, ActivationName, initialise
from nn_models.feedforward import MLP, MLPSpec
from nn_models.signature import Signature

SIGNATURE = Signature(input_shape=(7,), num_outputs=3)

FORMULAS = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(0, x),
    "leaky_relu": lambda x: np.maximum(0.01 * x, x),
    "elu": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "gelu": lambda x: x * torch.special.ndtr(torch.from_numpy(x)).numpy(),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softplus": lambda x: np.log(1 + np.exp(x)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("ours", "theirs"), [("sigmoid", "logistic"), ("tanh", "tanh"), ("relu", "relu")])
def test_equals_scikit_learn_with_copied_weights(ours, theirs):
    random = np.random.default_rng(0)
    rows, labels = random.normal(size=(60, 7)), random.integers(3, size=60)
    oracle = MLPClassifier(hidden_layer_sizes=(11, 5), activation=theirs, random_state=0)
    oracle.partial_fit(rows, labels, classes=[0, 1, 2])

    model = MLPSpec(hidden=(11, 5), activation=ours).build(SIGNATURE).double()
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for linear, weight, bias in zip(linears, oracle.coefs_, oracle.intercepts_, strict=True):
            linear.weight.copy_(torch.from_numpy(weight.T))
            linear.bias.copy_(torch.from_numpy(bias))
    probabilities = model(torch.from_numpy(rows)).softmax(1).detach().numpy()
    np.testing.assert_allclose(probabilities, oracle.predict_proba(rows), rtol=1e-12)  # float64, another sum order


def test_equals_a_chain_of_functions_with_normalisation_and_dropout():
    model = MLPSpec(hidden=(6, 4), activation="elu", batch_norm=True, dropout=0.3).build(SIGNATURE)
    x = torch.randn(9, 7)
    (first, second), output = model.hidden, model.output

    torch.manual_seed(1)
    h = x
    for block in (first, second):
        h = F.linear(h, block.linear.weight)
        h = F.batch_norm(h, None, None, block.norm.weight, block.norm.bias, training=True)
        h = F.dropout(F.elu(h), 0.3)
    expected = F.linear(h, output.weight, output.bias)

    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


def test_without_hidden_layers_is_linear_regression():
    model = MLPSpec(hidden=()).build(SIGNATURE)
    x = torch.randn(4, 7)
    assert torch.equal(model(x), F.linear(x, model.output.weight, model.output.bias))


def test_images_are_flattened_in_memory_order():
    model = MLPSpec().build(Signature(input_shape=(2, 3, 4), num_outputs=5))
    x = torch.randn(6, 2, 3, 4)
    assert torch.equal(model(x), model(x.reshape(6, 24)))


@pytest.mark.parametrize("name", get_args(ActivationName))
def test_activation_is_its_formula(name):
    x = np.linspace(-6, 6, 101)
    y = ACTIVATIONS[name]()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, FORMULAS[name](x), rtol=1e-9, atol=1e-9)  # float64; exp(x) - 1 loses digits near zero


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "elu", "gelu", "silu", "softplus"])  # smooth ones
def test_gradients_equal_finite_differences(activation):
    model = MLP(3, 2, hidden=(4,), activation=activation, dropout=0.0, batch_norm=True).double()
    assert torch.autograd.gradcheck(model, torch.randn(5, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("activation", "variance"),
    [
        ("tanh", 2 / (300 + 500)),  # Glorot & Bengio 2010, eq. 12
        ("sigmoid", 2 / (300 + 500)),
        (None, 2 / (300 + 500)),
        ("relu", 2 / 300),  # He et al. 2015, eq. 10
        ("gelu", 2 / 300),
    ],
)
def test_initial_variance_is_the_papers(activation, variance):
    layer = nn.Linear(300, 500)
    initialise(layer, activation=activation)
    assert layer.weight.var().item() == pytest.approx(variance, rel=0.02)  # 150,000 draws: 6 standard errors
    assert not layer.bias.any()


def test_a_deep_relu_net_keeps_the_size_of_its_signal():
    model = MLPSpec(hidden=(512,) * 20).build(Signature(input_shape=(512,), num_outputs=10))
    x = torch.randn(64, 512)
    last = model.hidden(x)
    assert 0.3 < (last.square().mean() / x.square().mean()).item() < 3  # torch's own initial weights give 1e-15

"""Autoencoders against what nobody here wrote: torch.distributions, autograd, scikit-learn, SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch.autograd.functional import jacobian
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from nn_models import zoo
from nn_models.autoencoder import principal_angles
from nn_models.batch import Batch, Place
from nn_models.columns import Features, Image, Sequence
from nn_models.contractive import ContractiveSpec
from nn_models.noise import CODE, normal
from nn_models.objectives import only_here
from nn_models.pca import PrincipalComponents
from nn_models.reconstruction import ReconstructionSpec
from nn_models.signature import Signature
from nn_models.sparse import bernoulli_divergence, of_mean
from nn_models.variational_objective import VariationalSpec, divergence

ROWS, SIZE = 7, 12
FEATURES = Signature(columns={"input": Features(size=SIZE)})
IMAGES = Signature(columns={"input": Image(shape=(2, 5, 6))})
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64, sums of some hundred products


def built(model, signature=FEATURES):
    torch.manual_seed(0)
    return zoo.build(model, signature).double()


def rows(signature=FEATURES, num=ROWS):
    return torch.rand(num, *signature.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def batch(values):
    return Batch({"input": values}, Place.of(len(values)), lambda: torch.arange(len(values)) * 7919)


# -- contraction ---------------------------------------------------------------------------------------------------

ENCODERS = [
    ({"kind": "autoencoder", "hidden": [], "code": 4, "code_activation": "sigmoid"}, FEATURES),
    ({"kind": "autoencoder", "hidden": [9], "code": 4, "activation": "tanh"}, FEATURES),
    ({"kind": "autoencoder", "hidden": [9, 8, 6], "code": 4, "activation": "silu", "tied": True}, FEATURES),
    ({"kind": "autoencoder", "hidden": [9, 8], "code": 4, "activation": "relu", "code_activation": "tanh"}, IMAGES),
    ({"kind": "conv_autoencoder", "channels": [3, 4], "code": 4, "activation": "tanh"}, IMAGES),
]


@pytest.mark.parametrize(("model", "signature"), ENCODERS)
def test_the_contraction_is_the_norm_of_autograds_jacobian(model, signature):
    net, x = built(model, signature), rows(signature)
    codes, found = net.contraction(x)
    torch.testing.assert_close(codes, net.encode(x), **EXACT)
    each = [jacobian(net.encode, row[None], create_graph=True) for row in x]
    wanted = torch.stack([matrix.square().sum() for matrix in each])
    torch.testing.assert_close(found, wanted, **EXACT)
    weights = list(net.parameters())  # those of the decoder have no part in it
    gradients = torch.autograd.grad(found.sum(), weights, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(wanted.sum(), weights, allow_unused=True, materialize_grads=True)
    assert any(gradient.any() for gradient in expected)
    torch.testing.assert_close(gradients, expected, **EXACT)


def test_the_contractive_loss_is_the_error_and_the_weighted_norm():
    net, x = built(ENCODERS[1][0]), rows()
    measured = ContractiveSpec(weight=0.3).build(FEATURES).measure(net, batch(x))
    norms = net.contraction(x)[1]
    errors = (net(x) - x).square().mean(1)
    assert measured.loss.item() == pytest.approx((errors + 0.3 * norms).sum().item(), rel=1e-12)
    assert measured.sums.tolist() == pytest.approx(
        [errors.sum().item(), errors.sum().item() * SIZE, norms.sum().item()]
    )
    with torch.no_grad():  # as in evaluation
        again = ContractiveSpec(weight=0.3).build(FEATURES).measure(net, batch(x))
    assert again.loss.item() == pytest.approx(measured.loss.item(), rel=1e-12)


# -- distributions -------------------------------------------------------------------------------------------------


def test_the_codes_divergence_is_torchs():
    mean, log_variance = rows() * 4 - 2, rows(num=ROWS) * 6 - 3
    wanted = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(divergence(mean, log_variance), wanted, **EXACT)


@pytest.mark.parametrize("rho", [0.05, 0.5, 0.9])
def test_the_sparse_divergence_is_torchs(rho):
    means = rows() * 0.98 + 0.01
    wanted = kl_divergence(Bernoulli(torch.tensor(rho, dtype=torch.float64)), Bernoulli(means))
    torch.testing.assert_close(bernoulli_divergence(rho, means), wanted, **EXACT)


@pytest.mark.parametrize("variance", ["learned", 0.3])
def test_the_gaussian_decoders_likelihood_is_torchs(variance):
    net = built({"kind": "vae", "hidden": [8], "code": 3, "decoder": "gaussian", "variance": variance})
    if variance == "learned":
        torch.nn.init.constant_(net.log_variance, -0.7)
    x, outputs = rows(), rows() * 2
    scale = math.exp(-0.35) if variance == "learned" else math.sqrt(0.3)
    # float32 holds the logarithm of a fixed variance
    torch.testing.assert_close(
        net.log_likelihood(x, outputs), Normal(outputs, scale).log_prob(x).sum(1), rtol=1e-6, atol=1e-6
    )


def test_the_bernoulli_decoders_likelihood_is_torchs():
    net, x, logits = built({"kind": "vae", "hidden": [8], "code": 3}), rows(), rows() * 6 - 3
    wanted = Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(1)
    torch.testing.assert_close(net.log_likelihood(x, logits), wanted, **EXACT)


def test_the_bounds_are_those_of_the_densities():
    net, x, samples = built({"kind": "vae", "hidden": [8], "code": 3}).float().eval(), rows().float(), 6
    found = net(x, batch(x).keys, samples=samples)
    posterior = Normal(found.mean, (0.5 * found.log_variance).exp())
    weights = []
    for sample in range(samples + 1):
        z = found.mean + posterior.scale * normal(batch(x).keys, 3, stream=CODE + sample)
        likelihood = Bernoulli(probs=net.decode(z), validate_args=False).log_prob(x).sum(1)
        weights.append(likelihood + (Normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z)).sum(1))
        if sample == 0:
            torch.testing.assert_close(found.log_likelihood, likelihood, rtol=1e-5, atol=1e-5)  # float32
            torch.testing.assert_close(found.outputs, net.decode(z))
    wanted = torch.logsumexp(torch.stack(weights[1:]), 0) - math.log(samples)
    torch.testing.assert_close(found.log_bound, wanted, rtol=1e-5, atol=1e-5)
    assert net.train()(x, batch(x).keys, samples=samples).log_bound is None


def test_bounds_lie_below_the_likelihood_that_a_linear_decoder_has():
    """p(x) = N(c, V V^T + s^2 1) where g(z) = V z + c (Tipping & Bishop 1999): the more samples, the nearer."""
    net = built({"kind": "vae", "hidden": [], "code": 3, "decoder": "gaussian", "variance": 0.5}).float().eval()
    x = rows(num=400).float()
    weight, bias = net.output.weight.detach(), net.output.bias.detach()
    covariance = weight @ weight.T + 0.5 * torch.eye(SIZE)
    true = MultivariateNormal(bias, covariance).log_prob(x).mean().item()
    objective = VariationalSpec(samples=50).build(FEATURES)
    with torch.no_grad():
        elbo = -objective.measure(net, batch(x)).sums[0].item() / len(x)
        bounds = [net(x, batch(x).keys, samples=number).log_bound.mean().item() for number in (5, 50, 2000)]
    assert elbo < bounds[0] < bounds[1] < bounds[2] < true + 0.05  # 400 rows: the mean is off by less than that
    assert bounds[2] == pytest.approx(true, abs=0.1)


# -- what a batch has in common ------------------------------------------------------------------------------------


def test_a_mean_over_ranks_has_the_gradient_of_one_worker():
    values = (rows(num=9) * 0.8 + 0.1).requires_grad_()

    def function(means):
        return bernoulli_divergence(0.2, means).sum()

    (wanted,) = torch.autograd.grad(9 * function(values.mean(0)), values)
    parts = (values[:4], values[4:])
    count = torch.tensor([9.0], dtype=torch.float64)
    total = torch.cat((values.detach().sum(0), count))
    found = [of_mean(part, function, batch(part), lambda _: total) for part in parts]
    torch.testing.assert_close(sum(found), 9 * function(values.mean(0)), **EXACT)
    torch.testing.assert_close(torch.autograd.grad(sum(found), values)[0], wanted, **EXACT)
    torch.testing.assert_close(of_mean(values, function, batch(values), only_here), sum(found), **EXACT)
    stands_in = batch(values[:1])
    empty = Batch(stands_in.columns, stands_in.place._replace(num_rows=0), stands_in.draw_keys)
    assert of_mean(values[:1], function, empty, lambda _: total).item() == pytest.approx(0)


# -- sequences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "layers"), [("gru", 1), ("lstm", 2), ("rnn", 1)])
def test_a_sequence_is_read_and_written_by_torchs_cells(cell, layers):
    signature = Signature(columns={"input": Sequence(width=3, length=5)})
    model = {"kind": "sequence_autoencoder", "cell": cell, "hidden": 6, "layers": layers, "code": 4}
    net, x = built(model, signature), rows(signature)
    kind = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM, "rnn": torch.nn.RNN}[cell]
    reads, writes = (kind(size, 6, layers, batch_first=True).double() for size in (3, 4))
    reads.load_state_dict(net.encoder.core.state_dict())
    writes.load_state_dict(net.decoder.core.state_dict())
    _, state = reads(x)
    last = (state[0] if cell == "lstm" else state)[-1]
    codes = torch.nn.functional.linear(last, net.code.linear.weight, net.code.linear.bias)
    steps, _ = writes(codes[:, None].repeat(1, 5, 1))
    torch.testing.assert_close(net.encode(x), codes, **EXACT)
    torch.testing.assert_close(net(x), net.output(steps), **EXACT)


# -- linear autoencoders and PCA -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().data / 16).float()


def test_the_baseline_is_scikit_learns_pca(digits):
    baseline = PrincipalComponents(64, 8)
    for part in digits.split(300):
        baseline.add(batch(part))
    found = baseline.models(only_here, torch.device("cpu"))["pca"]
    wanted = PCA(8).fit(digits.double().numpy())
    again = wanted.inverse_transform(wanted.transform(digits.numpy()))
    np.testing.assert_allclose(found(digits), again, atol=2e-5)  # float32 products of 64 numbers
    assert np.abs((found.components.double().numpy() * wanted.components_).sum(1)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(found(digits, keep_codes=True).codes, (digits - found.mean) @ found.components.T)


@pytest.mark.parametrize("tied", [False, True])
def test_a_linear_autoencoder_comes_to_the_principal_subspace(tied, digits):
    """Baldi & Hornik 1989: no minimum but the global one, where the net's subspace is that of the components."""
    train, test = digits[:1500], digits[1500:]
    signature = Signature(columns={"input": Features(size=64)})
    torch.manual_seed(0)
    net = zoo.build({"kind": "autoencoder", "hidden": [], "code": 8, "tied": tied}, signature)
    objective = ReconstructionSpec().build(signature)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective.measure(net, batch(train)).loss / len(train)
        loss.backward()
        return loss

    optimizer.step(closure)
    pca = PCA(8).fit(train.numpy())
    with torch.no_grad():
        ours = [(net(part) - part).square().mean().item() for part in (train, test)]
    theirs = [
        np.square(pca.inverse_transform(pca.transform(part.numpy())) - part.numpy()).mean() for part in (train, test)
    ]
    assert theirs[0] * (1 - 1e-6) <= ours[0] < theirs[0] * 1.001  # nothing linear is better on the rows it is fitted to
    assert ours[1] == pytest.approx(theirs[1], rel=5e-3)
    decoder = net.decoder[0].weight.T if tied else net.decoder[0].linear.weight
    angles = principal_angles(decoder.detach(), torch.from_numpy(pca.components_.T))
    assert angles[0] < 2


@pytest.mark.parametrize("widths", [(3, 3), (5, 2), (2, 4)])
def test_principal_angles_are_scipys(widths):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(9, width, dtype=torch.float64, generator=generator) for width in widths)
    wanted = np.rad2deg(subspace_angles(first.numpy(), second.numpy()))
    np.testing.assert_allclose(principal_angles(first, second), wanted, atol=1e-6)
    near = first + 1e-9 * torch.randn(9, widths[0], dtype=torch.float64, generator=generator)
    assert principal_angles(first, near)[0] < 1e-6

"""Activations by name, and the initial weights that suit each; those of GANs, and spectral normalisation."""

from typing import Literal

from torch import nn
from torch.nn.utils import parametrizations

ActivationName = Literal["sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "silu", "softplus"]

ACTIVATIONS: dict[ActivationName, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,  # 1 / (1 + exp(-x))
    "tanh": nn.Tanh,
    "relu": nn.ReLU,  # max(0, x); Nair & Hinton 2010
    "leaky_relu": nn.LeakyReLU,  # max(0.01 x, x); Maas et al. 2013
    "elu": nn.ELU,  # x for x > 0, else exp(x) - 1; Clevert et al. 2016
    "gelu": nn.GELU,  # x Phi(x), Phi the normal distribution; Hendrycks & Gimpel 2016
    "silu": nn.SiLU,  # x sigmoid(x); Hendrycks & Gimpel 2016
    "softplus": nn.Softplus,  # log(1 + exp(x)), a smooth relu
}

SATURATING = frozenset({"sigmoid", "tanh"})


def initialise(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, *, activation: ActivationName | None) -> None:
    """Draw a layer's weights for the activation that follows it (None for an output layer); zero its biases.

    With n_in inputs and n_out outputs a unit, weights are uniform in [-a, a]:

    - sigmoid, tanh, none: a = sqrt(6 / (n_in + n_out)), which keeps the variance of signals and gradients
      through units that are about linear near zero (Glorot & Bengio 2010, eq. 16);
    - the relu family: a = sqrt(6 / n_in), twice the variance, as a rectifier drops half of it
      (He et al. 2015, eq. 10).
    """
    if activation is None or activation in SATURATING:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def normalise_spectrum(layer: nn.Module) -> nn.Module:
    """Divide the layer's weight, seen as a matrix, by its largest singular value (Miyato et al. 2018, eq. 8).

    The singular value comes from one power iteration each time the layer runs in training, after 15 at the start.
    """
    return parametrizations.spectral_norm(layer)


def initialise_like_dcgan(module: nn.Module) -> None:
    """Weights N(0, 0.02) (Radford et al. 2015, section 4), normalisation's gains N(1, 0.02), biases 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)):
            nn.init.normal_(layer.weight, 1.0, 0.02)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

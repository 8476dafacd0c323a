"""Variational autoencoders: a code is drawn, and a row from it; dense or convolutional, of any rows or of a class.

Shapes: B rows of the batch, D numbers of a row, K numbers of a code, C classes, S samples.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from nn_models.activations import ACTIVATIONS, ActivationName, initialise
from nn_models.coding import CodingSpec, ConvolutionalDecoder, ConvolutionalEncoder, Unit, smallest_side
from nn_models.columns import Features, Image, Label, Scale
from nn_models.errors import UserError
from nn_models.model import reading
from nn_models.noise import CODE, normal
from nn_models.signature import Signature

Decoder = Literal["bernoulli", "gaussian"]


class Inferred(NamedTuple):
    """What a variational net says of rows whose keys it is given, for which it draws one code each.

    `outputs` (B, *shape), the mean of p(x | z), and `log_likelihood` (B,), log p(x | z) in nats, are of that z; `mean`
    and `log_variance` (B, K) are those of q(z | x). `log_bound` (B,) is the importance-weighted bound on log p(x), in
    evaluation only.
    """

    outputs: Tensor
    log_likelihood: Tensor
    mean: Tensor
    log_variance: Tensor
    log_bound: Tensor | None


class VAE(nn.Module):
    """Variational autoencoder (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

        p(z) = N(0, 1)        q(z | x) = N(mu(x), sigma^2(x))        z = mu + sigma n,  n ~ N(0, 1)
        bernoulli: p(x | z) = prod_d p_d^x_d (1 - p_d)^(1 - x_d),  p = sigmoid(g(z))
        gaussian:  p(x | z) = prod_d N(x_d; g_d(z), s^2),  s^2 fixed, or one number that is learned (Rybkin et al. 2021)
        log p(x) >= E log (1/S) sum_s p(x | z_s) p(z_s) / q(z_s | x)        (Burda, Grosse & Salakhutdinov 2016, eq. 8)

    n comes from each row's key. Of numbers between 0 and 1 bernoulli's is no density that integrates to 1; it is used
    as one all the same, as is usual for pictures. Given classes y, all of these are p(z), q(z | x, y) and p(x | z, y)
    (Sohn, Lee & Yan 2015): y, one of C, stands beside what the first dense layer of either part reads.
    """

    def __init__(
        self,
        row_shape: Sequence[int],
        *,
        num_classes: int,
        channels: Sequence[int],
        hidden: Sequence[int],
        code: int,
        activation: ActivationName,
        decoder: Decoder,
        variance: float | Literal["learned"],
    ) -> None:
        """`num_classes` is 0 where it is given none."""
        super().__init__()
        self.row_shape, self.num_classes, self.distribution = tuple(row_shape), num_classes, decoder
        self.convolutions: nn.Module = nn.Identity()
        self.deconvolutions: nn.Module = nn.Identity()
        self.flat_shape = self.row_shape
        size = torch.Size(row_shape).numel()
        if channels:
            self.convolutions = ConvolutionalEncoder(row_shape, channels=channels, activation=activation)
            mirrored = ConvolutionalDecoder(self.convolutions, row_shape, activation=activation)
            self.deconvolutions = nn.Sequential(ACTIVATIONS[activation](), mirrored)
            size = torch.Size(self.convolutions.output_shape).numel()
        self.encoder, self.posterior = _dense(size + num_classes, hidden, 2 * code, activation)
        self.decoder, self.output = _dense(code + num_classes, hidden[::-1], size, activation)
        if decoder == "gaussian":
            start = 0.0 if variance == "learned" else math.log(variance)
            log_variance = torch.full((), start)
            if variance == "learned":
                self.log_variance = nn.Parameter(log_variance)
            else:
                self.register_buffer("log_variance", log_variance, persistent=False)

    # -- the distributions -----------------------------------------------------------------------------------------

    def infer(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance (B, K) of q(z | x), or of q(z | x, label)."""
        features = self.convolutions(x).flatten(1)
        mean, log_variance = self.posterior(self.encoder(self._beside(features, label))).chunk(2, 1)
        return mean, log_variance

    def encode(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """The means of q (B, K): a row's code."""
        return self.infer(x, label)[0]

    def decode(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        """The means of p(x | z) (B, *shape), at the scale of the rows."""
        outputs = self._decoded(codes, label)
        return outputs.sigmoid() if self.distribution == "bernoulli" else outputs

    def log_likelihood(self, x: Tensor, outputs: Tensor) -> Tensor:
        """log p(x | z) (B,) in nats, of the decoder's logits or means."""
        if self.distribution == "bernoulli":
            each = -F.binary_cross_entropy_with_logits(outputs, x.to(outputs.dtype), reduction="none")
            return each.flatten(1).sum(1)
        squares = (outputs - x).square().flatten(1).sum(1)
        constant = x[0].numel() * (math.log(2 * math.pi) + self.log_variance)
        return -0.5 * (squares * torch.exp(-self.log_variance) + constant)

    # -- what the objective asks -----------------------------------------------------------------------------------

    def forward(self, x: Tensor, keys: Tensor | None = None, *, label: Tensor | None = None, samples: int = 0) -> Any:
        """(B, *shape) -> the same again by way of q's mean; with the rows' keys (B,), see Inferred.

        `samples` are those of the importance-weighted bound.
        """
        mean, log_variance = self.infer(x, label)
        if keys is None:
            return self.decode(mean, label)
        # autocast makes them of half precision, in which a sum over a row's numbers says little
        mean, log_variance = mean.float(), log_variance.float()
        noise = normal(keys, mean.shape[1], stream=CODE)
        outputs = self._decoded(mean + (0.5 * log_variance).exp() * noise, label).float()
        bound = None
        if samples and not self.training:
            bound = self._log_bound(x, keys, mean, log_variance, label, samples)
        shown = outputs.sigmoid() if self.distribution == "bernoulli" else outputs
        return Inferred(shown, self.log_likelihood(x, outputs), mean, log_variance, bound)

    def _log_bound(
        self, x: Tensor, keys: Tensor, mean: Tensor, log_variance: Tensor, label: Tensor | None, samples: int
    ) -> Tensor:
        """(B,): log (1/S) sum_s p(x | z_s) p(z_s) / q(z_s | x); one z of all rows at once, which bounds memory."""
        weights = []
        for sample in range(1, samples + 1):
            noise = normal(keys, mean.shape[1], stream=CODE + sample)
            codes = mean + (0.5 * log_variance).exp() * noise
            # both normal densities have the same constant
            prior, posterior = codes.square(), noise.square() + log_variance
            likelihood = self.log_likelihood(x, self._decoded(codes, label).float())
            weights.append(likelihood - 0.5 * (prior - posterior).sum(1))
        return torch.logsumexp(torch.stack(weights), 0) - math.log(samples)

    def _decoded(self, codes: Tensor, label: Tensor | None) -> Tensor:
        """Logits or means (B, *shape)."""
        flat = self.output(self.decoder(self._beside(codes, label)))
        whole: Tensor = self.deconvolutions(flat)
        return whole.unflatten(1, self.row_shape) if whole.dim() == 2 else whole

    def _beside(self, values: Tensor, label: Tensor | None) -> Tensor:
        if not self.num_classes:
            return values
        assert label is not None  # the Spec reads it
        # not one_hot, which looks at the values and so waits for the device
        chosen = torch.arange(self.num_classes, device=values.device) == label[:, None]
        return torch.cat((values, chosen.to(values.dtype)), 1)


def _dense(
    num_inputs: int, hidden: Sequence[int], num_outputs: int, activation: ActivationName
) -> tuple[nn.Sequential, nn.Linear]:
    """Hidden layers, and the linear one that follows them."""
    layers = nn.Sequential()
    for width in hidden:
        layers.append(Unit(num_inputs, width, activation=activation))
        num_inputs = width
    output = nn.Linear(num_inputs, num_outputs)
    initialise(output, activation=None)
    return layers, output


class _VariationalSpec(CodingSpec):
    """Base of the variational nets' descriptions."""

    gives = frozenset({"posterior"})
    code: PositiveInt = Field(20, description="numbers of a row's code")
    channels: tuple[PositiveInt, ...] = Field(
        (),
        description="kernels of each convolution, which halves height and width; [] for dense layers only",
    )
    hidden: tuple[PositiveInt, ...] = Field((400,), description="units of each dense layer before the code")
    activation: ActivationName = Field("relu", description="what follows each convolution and hidden layer")
    decoder: Decoder = Field("bernoulli", description="p(x | z): bernoulli of bytes as 0 to 1, gaussian of any numbers")
    variance: PositiveFloat | Literal["learned"] = Field(
        "learned", description="of a gaussian decoder: one number for all of a row's numbers"
    )

    @property
    def scale(self) -> Scale:
        """See ModelSpec: a Bernoulli distribution is of numbers from 0 to 1 only."""
        return "bounded" if self.decoder == "bernoulli" else "pixels"

    def check(self, signature: Signature) -> None:
        """Raise UserError where there are channels but no images, or too small ones."""
        super().check(signature)
        if not self.channels:
            return
        if not isinstance(signature["input"], Image):
            raise UserError(
                "model.channels",
                f"convolutions read images, but the data has {signature['input'].describe()}",
                "leave it out",
            )
        smallest_side(signature, self.channels)

    def build(self, signature: Signature) -> VAE:
        """The module: rows of `signature.input_shape` -> the same shape, or Inferred."""
        return VAE(signature.input_shape, num_classes=self.num_classes(signature), **self.settings())

    def num_classes(self, signature: Signature) -> int:
        """Classes that it is told of; 0 for none."""
        return 0


class VAESpec(_VariationalSpec):
    """Variational autoencoder (Kingma & Welling 2014): codes are drawn; dense or convolutional."""

    batches = "vmap"
    kind: Literal["vae"] = "vae"


class ConditionalVAESpec(_VariationalSpec):
    """Variational autoencoder that is told the label and makes rows of a class (Sohn et al. 2015)."""

    reads = reading(input=(Features, Image), target=Label)
    kind: Literal["conditional_vae"] = "conditional_vae"

    def check(self, signature: Signature) -> None:
        """Raise UserError where there are no labels, or only one."""
        super().check(signature)
        if signature.num_outputs < 2:
            raise UserError(
                "model.kind",
                f"{self.kind} is told each row's label, but the data has {signature.num_outputs} class",
                "choose data with labels, or set model.kind to vae",
            )

    def num_classes(self, signature: Signature) -> int:
        """See _VariationalSpec."""
        return signature.num_outputs

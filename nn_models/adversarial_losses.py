"""Adversarial objectives: what the two halves of a GAN minimise.

Losses are sums over rows, never means: sums over batches and ranks add up, and training divides by the number of
rows once. A row judged patch by patch counts with the mean over its patches.

Shapes: B rows of the batch, C channels, H and W height and width; logits are (B,), or (B, 1, h, w) for patches.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from nn_models.adversarial import AdversarialSpec
from nn_models.columns import Image, Label
from nn_models.errors import UserError
from nn_models.metrics import Metric, Reported
from nn_models.model import ModelSpec
from nn_models.objectives import ObjectiveSpec, at_least_float32, check_outputs
from nn_models.signature import Signature
from nn_models.spec import invalid

LossName = Literal["minimax", "non_saturating", "least_squares", "hinge", "wasserstein"]
UNSMOOTHED = frozenset({"hinge", "wasserstein"})  # their discriminators predict no label that could be smoothed


class Game(NamedTuple):
    """What one logit l costs: the discriminator on a real row (with label smoothing s) and on a fake, the generator."""

    real: Callable[[Tensor, float], Tensor]
    fake: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _cross_entropy_real(logits: Tensor, smoothing: float) -> Tensor:
    # -(1 - s) log D - s log(1 - D); softplus(-l) and not softplus(l) - l, which cancels where D is sure
    return F.softplus(-logits) + smoothing * logits


GAMES: dict[LossName, Game] = {
    "minimax": Game(_cross_entropy_real, F.softplus, lambda logits: -F.softplus(logits)),
    "non_saturating": Game(_cross_entropy_real, F.softplus, lambda logits: F.softplus(-logits)),
    "least_squares": Game(
        lambda logits, smoothing: (logits - (1 - smoothing)).square() / 2,
        lambda logits: logits.square() / 2,
        lambda logits: (logits - 1).square() / 2,
    ),
    "hinge": Game(lambda logits, _: F.relu(1 - logits), lambda logits: F.relu(1 + logits), torch.neg),
    "wasserstein": Game(lambda logits, _: -logits, lambda logits: logits, torch.neg),
}


class AdversarialObjective:
    """The losses of both halves. With l a row's logit, D = sigmoid(l), and s the label smoothing, the row costs

                         discriminator, real        discriminator, fake   generator
        minimax          -(1-s) log D - s log(1-D)  -log(1 - D)           log(1 - D)
        non_saturating   the same                   the same              -log D
        least_squares    (l - (1-s))^2 / 2          l^2 / 2               (l - 1)^2 / 2
        hinge            max(0, 1 - l)              max(0, 1 + l)         -l
        wasserstein      -l                         l                     -l

    The first two are Goodfellow et al. 2014 (eq. 1, and section 3 for "non-saturating": where D spots each fake,
    log(1 - D) has no slope left); then Mao et al. 2017 (eq. 9), Lim & Ye 2017 and Arjovsky et al. 2017. Smoothing
    only the real rows' label is Salimans et al. 2016, section 3.4.

    Without smoothing, the first two discriminators maximise V(D, G) = E log D(real) + E log(1 - D(fake)), which is
    minus their loss. Their optimum is D* = p_data / (p_data + p_fake), where V = -ln 4 + 2 JSD(p_data, p_fake)
    (Goodfellow et al. 2014, proposition 1 and eq. 6). So where the fakes are as good as the data, D* = 1/2, V = -ln 4
    and the generator's loss is ln 2 (non-saturating) or -ln 2 (minimax): losses near these say that neither half wins.
    For least squares, the discriminator's loss is then 1/4 and the generator's 1/8.

    `gradient_penalty` and `l1_weight` are what `penalty` and `reconstruction` are to be multiplied by; where one
    is 0, its term need not be computed.
    """

    def __init__(self, loss: LossName, *, label_smoothing: float, gradient_penalty: float, l1_weight: float) -> None:
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.gradient_penalty = gradient_penalty
        self.l1_weight = l1_weight

    def discriminator_real(self, logits: Tensor) -> Tensor:
        """The discriminator's loss on real rows: logits -> (), summed over rows, at least float32."""
        return _sum_of_rows(GAMES[self.loss].real(at_least_float32(logits), self.label_smoothing))

    def discriminator_fake(self, logits: Tensor) -> Tensor:
        """The discriminator's loss on the generator's rows: logits -> (), summed over rows, at least float32."""
        return _sum_of_rows(GAMES[self.loss].fake(at_least_float32(logits)))

    def generator(self, logits_fake: Tensor) -> Tensor:
        """The generator's loss on its own rows: logits -> (), summed over rows, at least float32."""
        return _sum_of_rows(GAMES[self.loss].generator(at_least_float32(logits_fake)))

    def penalty(
        self,
        discriminator: nn.Module,
        real: Tensor,
        fake: Tensor,
        condition: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """(norm of the logit's gradient - 1)^2 between a real row and a fake one, summed over rows, without its weight.

        The gradient is taken at e real + (1 - e) fake, with one e a row, uniform in [0, 1) and drawn from `generator`
        (a generator of random numbers) on its own device (Gulrajani et al. 2017, eq. 3 and algorithm 1).
        `real` and `fake` (B, ...) get no gradient of it; the discriminator's parameters do.
        """
        share = torch.rand(len(real), generator=generator, device=generator.device).to(real)
        share = share.reshape(-1, *[1] * (real.dim() - 1))
        between = torch.lerp(fake.detach(), real.detach(), share).requires_grad_()
        # One row's logit must not depend on another row, or this sum mixes their gradients: see the Spec's check.
        logits_sum = _sum_of_rows(at_least_float32(discriminator(between, condition)))
        (gradient,) = torch.autograd.grad(logits_sum, between, create_graph=True)
        norm_B = torch.linalg.vector_norm(at_least_float32(gradient).flatten(1), dim=1)
        return (norm_B - 1).square().sum()

    def reconstruction(self, fake: Tensor, real: Tensor) -> Tensor:
        """|fake - real|, the mean over a row's numbers, summed over rows, without weight (Isola et al. 2016, eq. 3)."""
        return _sum_of_rows((at_least_float32(fake) - at_least_float32(real)).abs())


def _sum_of_rows(values: Tensor) -> Tensor:
    """(B,) or (B, ...) -> (): the mean over each row, summed over rows."""
    return values.sum() / math.prod(values.shape[1:])


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # in the order in which they stand on a progress bar
        Metric("frechet_distance", "less", "Frechet distance", "Frechet"),
        Metric("frechet_floor", None, "Frechet floor", "floor", floor_of="frechet_distance"),
        Metric("kernel_distance", "less"),
        Metric("kernel_floor", None, floor_of="kernel_distance"),
        Metric("label_agreement", "more", short="label agreement"),
        Metric("diversity", "more", short="diversity"),
        Metric("generator_loss", None, short="generator", together="loss", label="generator"),
        Metric("discriminator_loss", None, short="discriminator", together="loss", label="discriminator"),
        Metric("l1", "less", "L1", "L1"),
        Metric("real_accuracy", None, short="right on real", together="discriminator accuracy", label="on real rows"),
        Metric("fake_accuracy", None, short="on made", together="discriminator accuracy", label="on made rows"),
    )
}


class AdversarialObjectiveSpec(ObjectiveSpec):
    """Two halves against each other: the generator makes what the discriminator shall take for real."""

    takes = frozenset({"halves"})
    kind: Literal["adversarial"] = "adversarial"
    loss: LossName = Field("non_saturating", description="what the halves minimise")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="real rows are given to the discriminator as 1 minus this; fakes stay 0"
    )
    gradient_penalty: NonNegativeFloat | None = Field(
        None, description="weight of the discriminator's gradient penalty; by default 10 for wasserstein, else 0"
    )
    l1_weight: NonNegativeFloat = Field(
        0.0, description="weight of the generator's distance from the true image of a pair; 100 in pix2pix"
    )
    discriminator_steps: PositiveInt = Field(
        1, description="steps of the discriminator for each of the generator; 5 is usual for wasserstein"
    )

    @field_validator("label_smoothing")
    @classmethod
    def _only_labels_are_smoothed(cls, label_smoothing: float, info: ValidationInfo) -> float:
        loss = info.data.get("loss")
        if label_smoothing and loss in UNSMOOTHED:
            raise invalid(f"the {loss} loss has no labels to smooth", "set it to 0 or choose another loss")
        return label_smoothing

    def check(self, model: ModelSpec) -> None:
        """Raise UserError where the model has no two halves, or cannot be trained with these terms."""
        super().check(model)
        halves = cast(AdversarialSpec, model)  # as it gives halves
        if self.l1_weight and halves.given != "condition":
            raise UserError(
                "objective.l1_weight",
                f"{self.l1_weight:g} draws each image to the true one of its pair, but {model.kind} makes images "
                "without pairs",
                "set it to 0 or set model.kind to pix2pix",
            )
        if self._penalty_weight and halves.discriminator_mixes_rows:
            field, other = halves.norm_field
            raise UserError(
                "objective.gradient_penalty",
                f"{self._penalty_weight:g} needs a discriminator that judges each row by itself, but model.{field} is "
                "batch",
                f"set model.{field} to {other}, or objective.gradient_penalty to 0",
            )

    def refuse(self, model: ModelSpec) -> tuple[str, str]:
        """See ObjectiveSpec."""
        return (
            f"adversarial trains a generator and a discriminator, but {model.kind} is one net",
            "set model.kind to gan, dcgan, conditional_gan or pix2pix, or choose another objective",
        )

    @property
    def _penalty_weight(self) -> float:
        if self.gradient_penalty is None:
            return 10.0 if self.loss == "wasserstein" else 0.0
        return self.gradient_penalty

    def rehearse(self, description: ModelSpec, model: Any, signature: Signature, *, source: str) -> None:
        """See ObjectiveSpec: rows that the generator makes, and what the discriminator says of them."""
        spec, batch = cast(AdversarialSpec, description), signature.imagine(2)
        condition = batch[spec.given] if spec.given else None
        made = model(torch.zeros(2, spec.noise_size), condition)
        model.discriminator(made, condition)
        check_outputs(made, (2, *signature.input_shape), model=spec.kind, source=source)

    @classmethod
    def known_metrics(cls) -> tuple[Metric, ...]:
        """See ObjectiveSpec."""
        return tuple(METRICS.values())

    def build(self, signature: Signature) -> AdversarialObjective:
        """The losses."""
        return AdversarialObjective(
            self.loss,
            label_smoothing=self.label_smoothing,
            gradient_penalty=self._penalty_weight,
            l1_weight=self.l1_weight,
        )

    def reported(self, model: ModelSpec, signature: Signature | None) -> Reported:
        """See ObjectiveSpec: losses and accuracies of training, the quality of what is made at each look.

        Without a signature a classifier of the data is taken to be there, but for pairs.
        """
        given = cast(AdversarialSpec, model).given
        pairs = given == "condition"
        if signature is None:
            image, classes = True, not pairs
        else:
            image, classes = isinstance(signature["input"], Image), has_classes(signature)
        names = ["generator_loss", "discriminator_loss"]
        names += ["real_accuracy", "fake_accuracy"] if tells_apart(self.loss) else []
        names += ["l1"] if self.l1_weight else []
        seen = ["diversity", *(["frechet_distance", "kernel_distance"] if classes or not image else [])]
        seen += ["l1"] if pairs else ["label_agreement"] if given == "target" and image else []
        best = "frechet_distance" if "frechet_distance" in seen else "l1" if pairs else None
        return Reported(
            tuple(METRICS[name] for name in names),
            tuple(METRICS[name] for name in seen),
            best,
        )


def tells_apart(loss: LossName) -> bool:
    """Whether the sign of the discriminator's logit says what it takes a row for: a critic's does not."""
    return loss != "wasserstein"


def has_classes(signature: Signature) -> bool:
    """Whether a classifier of the rows can be trained."""
    target = signature.columns.get("target")
    return isinstance(target, Label) and target.num_outputs >= 2

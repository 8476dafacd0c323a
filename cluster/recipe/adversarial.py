"""The recipe's section `adversarial`: how the two halves of a GAN are trained and watched."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from cluster.data.manifest import Manifest
from cluster.recipe.optimizers import AnyOptimizerSpec
from nn_models.errors import UserError
from nn_models.spec import Spec

Share = Annotated[float, Field(ge=0, le=1)]


class QualitySpec(Spec):
    """What is made is compared with held-out real rows, as a classifier trained on the same data sees both."""

    num_images: Annotated[int, Field(ge=64)] = Field(
        2000, description="most rows that are made, and as many held-out ones that they are compared with"
    )
    every_epochs: PositiveInt = Field(1, description="epochs between two looks")

    def num_rows(self, manifest: Manifest, split: str) -> int:
        """Rows of a split that as many made ones, and training rows, are compared with.

        Raises UserError where there are too few to compare.
        """
        rows = min(self.num_images, manifest.rows(split), manifest.rows("train"))
        if rows < 2:
            raise UserError(
                "adversarial.quality",
                f"needs 2 rows at least, but {split} has {manifest.rows(split)} and train {manifest.rows('train')}",
                "add rows, or hold out more with data.validation_fraction or data.test_fraction",
            )
        return rows


class CollapseSpec(Spec):
    """When a game counts as collapsed: one half has won, or the generator makes the same row again and again."""

    patience: PositiveInt = Field(5, description="looks in a row that must be bad")
    min_diversity: Share = Field(
        0.25, description="mean distance between made rows, as a share of that between real ones; less is bad"
    )
    max_accuracy: Share = Field(
        0.995, description="share of rows that the discriminator tells apart; more is bad (not for wasserstein)"
    )
    max_rollbacks: NonNegativeInt = Field(3, description="times that both halves return to the best checkpoint")
    learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="what the learning rates are multiplied by at each return"
    )


class AdversarialTrainSpec(Spec):
    """How the halves play, and what is done when one of them wins."""

    mode: Literal["exact", "pipelined"] = Field(
        "exact",
        description="pipelined: the generator runs a step ahead of the gradients it learns from; faster, not the same",
    )
    discriminator_optimizer: AnyOptimizerSpec | None = Field(
        None, description="the discriminator's optimizer; by default of the same kind and values as the generator's"
    )
    quality: QualitySpec = QualitySpec()
    collapse: CollapseSpec = CollapseSpec()

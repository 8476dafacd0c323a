"""A GAN by hand: the usual loop in one process, as in PyTorch's DCGAN example; a generator over steps."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.recipe.recipe import Recipe
from nn_models.adversarial import AdversarialSpec
from nn_models.signature import Signature


def steps(recipe: Recipe, signature: Signature, images: Tensor) -> Iterator[None]:
    """One step each time; `images` (rows, C, H, W) in [-1, 1]."""
    model = recipe.model
    assert isinstance(model, AdversarialSpec)
    generator, discriminator = model.build_generator(signature), model.build_discriminator(signature)
    generator_adam, discriminator_adam = (
        recipe.optimizer.build(half.parameters()) for half in (generator, discriminator)
    )
    while True:
        for chosen in torch.randperm(len(images)).split(recipe.train.global_batch_size):
            real = images[chosen]
            fake = generator(torch.randn(len(real), model.noise_size))
            discriminator_adam.zero_grad()
            of_real, of_fake = discriminator(real), discriminator(fake.detach())
            F.binary_cross_entropy_with_logits(of_real, torch.ones_like(of_real)).backward()
            F.binary_cross_entropy_with_logits(of_fake, torch.zeros_like(of_fake)).backward()
            discriminator_adam.step()
            generator_adam.zero_grad()
            judged = discriminator(fake)
            F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged)).backward()
            generator_adam.step()
            yield

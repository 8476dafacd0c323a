"""Beginning: a new model: its weights as they are drawn, and what files of the user's say of them."""

import torch
from torch import nn

from cluster.data.word_vectors import read_vectors
from cluster.recipe.recipe import Recipe
from nn_models.signature import Signature


def new_model(recipe: Recipe, signature: Signature, *, begins: bool = True) -> nn.Module:
    """The recipe's model as its training begins, from the seed; one that goes on from a checkpoint needs no files.

    Raises UserError where a file that weights begin with cannot be read, or does not fit.
    """
    torch.manual_seed(recipe.train.seed)  # the same weights on all ranks
    model = recipe.model.build(signature)
    if begins and (wanted := recipe.model.wanted_vectors(signature)):
        found = read_vectors(wanted)
        recipe.model.take_vectors(model, torch.from_numpy(found.places), torch.from_numpy(found.vectors))
    return model

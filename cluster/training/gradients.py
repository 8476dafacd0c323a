"""Gradients of embeddings: only of the rows that a batch has touched, where the optimizer leaves the others alone."""

from collections import Counter

import torch
from torch import Tensor, nn

from cluster.recipe.recipe import Recipe

FEWEST_ROWS = 1024  # of an embedding; the gradient of a smaller one is quicker as a whole


def touch_only_used_rows(model: nn.Module, recipe: Recipe, *, device: torch.device) -> None:
    """Give large embeddings gradients of only the rows that a batch has used; before data parallelism sees the model.

    What comes out is the same: of an optimizer that has no momentum or decay, a row without gradient stays as it is.
    A GPU goes through all rows sooner than it could find out which are used, which the host would have to wait for.
    """
    recipes = [recipe, *(recipe.at(change.epoch) for change in recipe.changes)]
    if device.type != "cpu" or not all(each.optimizer.rests for each in recipes):
        return
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for module in model.modules():
        if isinstance(module, nn.Embedding) and owners[id(module.weight)] == 1:  # not an output's weights too
            module.sparse = module.num_embeddings >= FEWEST_ROWS and module.max_norm is None
    torch.sparse.check_sparse_tensor_invariants.disable()  # or torch warns that they are not checked


def clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm is at most `max_norm`. Returns the norm before, on the device."""
    if not any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    values = _values(parameters)
    norm = nn.utils.get_total_norm(values)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_ does it
    for gradient in values:
        gradient.mul_(factor)
    return norm


def total_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all gradients, on the device."""
    return nn.utils.get_total_norm(_values(parameters))


def _values(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradients' numbers, each once: those of a row that was used twice are added up."""
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    return values

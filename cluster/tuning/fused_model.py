"""The batched model of fused trials: all their weights in stacked tensors, computed at once through torch.func.

Shapes: T trials, B rows of the batch, M metrics of the objective.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from cluster.training.recipe import Recipe
from cluster.tuning.fused_layers import fuse_layers
from nn_models.objectives import Classification, Measured, Objective
from nn_models.spec import Signature

Measure = Callable[..., tuple[Tensor, Tensor]]


class FusedModel:
    """T models of one kind. `parameters` and `buffers` hold (T, *shape) for a shape of one model's.

    The losses of different trials have nothing in common, so the gradient of their sum is each one's own: autograd
    runs over the batched operations as they are, which costs less than vmap over `torch.func.grad`.
    """

    def __init__(self, recipes: Sequence[Recipe], signature: Signature, *, device: torch.device) -> None:
        models = []
        for recipe in recipes:
            torch.manual_seed(recipe.train.seed)  # the weights that the trial would start with alone
            models.append(recipe.model.build(signature).to(device))
        self.plain = models[0]  # not batched: to evaluate one trial's best weights with
        self._template = copy.deepcopy(self.plain)
        fuse_layers(self._template, models)
        self.parameters, self.buffers = stack_module_state(models)
        self.average: dict[str, Tensor] | None = None  # moving averages of the parameters
        self.num_averaged = 0
        self._decay = recipes[0].train.ema_decay
        if self._decay:
            self.average = {name: weight.detach().clone() for name, weight in self.parameters.items()}

        self.objective = recipes[0].supervised.build(signature.num_outputs)
        smoothings = [getattr(recipe.objective, "label_smoothing", 0.0) for recipe in recipes]
        self._smoothings = torch.tensor(smoothings, device=device) if len(set(smoothings)) > 1 else None
        self._ends = [Classification(signature.num_outputs, label_smoothing=end) for end in (0.0, 1.0)]

        named = dict(self.plain.named_parameters()) | dict(self.plain.named_buffers())
        names = {id(tensor): name for name, tensor in named.items()}
        # a tied weight has two names in a state dict and one among the parameters
        self._names = {key: names[id(tensor)] for key, tensor in self.plain.state_dict(keep_vars=True).items()}

    @property
    def size(self) -> int:
        """T, the trials that are left."""
        return len(next(iter(self.parameters.values())))

    def keep(self, places: Sequence[int]) -> None:
        """Leave only the trials at these places."""
        index = torch.tensor(places, device=next(iter(self.parameters.values())).device)

        def chosen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: tensor.detach().index_select(0, index).requires_grad_(tensor.requires_grad)
                for name, tensor in tensors.items()
            }

        self.parameters, self.buffers = chosen(self.parameters), chosen(self.buffers)
        self.average = chosen(self.average) if self.average else None
        self._smoothings = None if self._smoothings is None else self._smoothings.index_select(0, index)

    # -- computing -------------------------------------------------------------------------------------------------

    def measure(self, inputs: Tensor, targets: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
        """Losses (T,), differentiable, and metrics (T, M), float64: sums over rows, in training mode.

        All trials get the same rows, inputs (B, …), or where they are not `shared` each its own: (T, B, …).
        """
        self._template.train()
        return self._over_trials(self.parameters, inputs, targets, shared=shared)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The same in evaluation mode for rows (B, …), by the averaged weights where there are such."""
        self._template.eval()
        return self._over_trials(self.average or self.parameters, inputs, targets, shared=True)

    def _over_trials(
        self, parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor, *, shared: bool
    ) -> tuple[Tensor, Tensor]:
        rows = None if shared else 0
        smoothing = None if self._smoothings is None else 0
        dims = (0, 0, smoothing, rows, rows)
        batched: Measure = vmap(self._one, in_dims=dims, randomness="different")
        return batched(parameters, self.buffers, self._smoothings, inputs, targets)

    def _one(
        self, parameters: Any, buffers: Any, smoothing: Tensor | None, inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One trial's loss () and metrics (M,)."""

        def model(rows: Tensor) -> Tensor:
            return functional_call(self._template, (parameters, buffers), (rows,))

        if smoothing is None:
            measured = _measured(self.objective, model, inputs, targets)
        else:  # torch's label_smoothing is no tensor; the loss is linear in it
            outputs = model(inputs)
            hard, soft = (_measured(end, lambda _: outputs, inputs, targets) for end in self._ends)
            measured = Measured(torch.lerp(hard.loss, soft.loss, smoothing), outputs.detach())
        return measured.loss, self.objective.sums(measured, targets)

    @torch.no_grad()
    def update_average(self) -> None:
        """Take the weights as they are now into the moving averages, as AveragedModel does."""
        if self.average is None:
            return
        averages, weights = list(self.average.values()), list(self.parameters.values())
        if self.num_averaged:
            torch._foreach_lerp_(averages, weights, 1 - (self._decay or 0.0))
        else:
            torch._foreach_copy_(averages, weights)
        self.num_averaged += 1

    def finite(self) -> Tensor:
        """(T,): whether all weights of each trial are neither NaN nor infinite."""
        whole = [weight.detach().flatten(1).isfinite().all(1) for weight in self.parameters.values()]
        return torch.stack(whole).all(0)

    # -- one trial's state, as the ordinary loop has it ------------------------------------------------------------

    def weights(self, place: int, *, evaluated: bool = False) -> dict[str, Tensor]:
        """The state dict of one trial's model, copied to the CPU; its averaged weights where `evaluated` is set."""
        parameters = (self.average or self.parameters) if evaluated else self.parameters
        stacks = parameters | self.buffers
        return {key: stacks[name][place].detach().to("cpu", copy=True) for key, name in self._names.items()}

    def averages(self, place: int) -> dict[str, Tensor] | None:
        """The state dict of one trial's AveragedModel; None where nothing is averaged."""
        if self.average is None:
            return None
        weights = {f"module.{key}": weight for key, weight in self.weights(place, evaluated=True).items()}
        return {"n_averaged": torch.tensor(self.num_averaged), **weights}

    @torch.no_grad()
    def load(self, place: int, weights: dict[str, Tensor], averages: dict[str, Tensor] | None) -> None:
        """Give one trial the state that `weights` and `averages` have returned, or that the ordinary loop has saved."""
        stacks = self.parameters | self.buffers
        for key, name in self._names.items():
            stacks[name][place].copy_(weights[key])
        if self.average is not None and averages is not None:
            self.num_averaged = int(averages["n_averaged"])
            for key, name in self._names.items():
                if name in self.average:
                    self.average[name][place].copy_(averages[f"module.{key}"])


def _measured(objective: Objective, model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> Measured:
    # all that an objective does with a model is to call it
    return objective.measure(model, inputs, targets)  # type: ignore[arg-type]


def num_parameters(model: nn.Module) -> int:
    """Parameters of one trial's model."""
    return sum(parameter.numel() for parameter in model.parameters())

"""The batched model of fused trials: all their weights in stacked tensors, computed at once.

Shapes: T trials, B rows of the batch, M metrics of the objective.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from cluster.recipe.recipe import Recipe
from cluster.training.average import NUM_AVERAGED, PREFIX, average_into, decay_at
from cluster.training.beginning import new_model
from cluster.tuning.fused.layers import free_dropout, widen
from nn_models.batch import Batch
from nn_models.objectives import Asked, Objective
from nn_models.signature import Signature


class FusedModel:
    """T models of one kind. `parameters` and `buffers` hold (T, *shape) for a shape of one model's.

    The losses of different trials have nothing in common, so the gradient of their sum is each one's own: autograd
    runs over the batched operations as they are, which costs less than vmap over `torch.func.grad`.
    """

    def __init__(
        self, recipes: Sequence[Recipe], signature: Signature, *, device: torch.device, wide: bool | None = None
    ) -> None:
        """`wide` models have the layers of `fused.layers`, others run by vmap; by default, as the Spec says."""
        models = []
        for recipe in recipes:
            models.append(new_model(recipe, signature).to(device))  # what the trial would start with alone
        self.plain = copy.deepcopy(models[0])  # not batched: to evaluate one trial's best weights with
        self._template = models[0]
        self._wide = recipes[0].model.batches == "wide" if wide is None else wide
        free_dropout(self._template, models)
        self.parameters, self.buffers = stack_module_state(models)
        if self._wide:
            self._template = copy.deepcopy(self._template)
            widen(self._template)
        self.objective = cast(Objective, recipes[0].objective.build(signature))
        self._each = _differing(recipes, device)

        named = dict(self.plain.named_parameters()) | dict(self.plain.named_buffers())
        names = {id(tensor): name for name, tensor in named.items()}
        # a tied weight has two names in a state dict and one among the parameters
        self._names = {key: names[id(tensor)] for key, tensor in self.plain.state_dict(keep_vars=True).items()}

        # moving averages of the parameters, and of running statistics, which belong to the weights that made them
        self.average: dict[str, Tensor] | None = None
        self.num_averaged = 0
        self._decay = recipes[0].train.ema_decay or 0.0
        if self._decay:
            stacks = self.parameters | self.buffers
            averaged = [name for name, tensor in named.items() if tensor.is_floating_point()]
            self.average = {name: stacks[name].detach().clone() for name in averaged}

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
        self._each = {name: values.index_select(0, index) for name, values in self._each.items()}

    # -- computing -------------------------------------------------------------------------------------------------

    def measure(self, batch: Batch, *, shared: bool) -> tuple[Tensor, Tensor]:
        """Losses (T,), differentiable, and sums of metrics (T, M), float64, in training mode.

        All trials get the same rows, values (B, …), or where they are not `shared` each its own: (B, T, …).
        """
        self._template.train()
        asked = self.objective.asks(batch, shared=shared, each=self._each)
        outputs = self._outputs(self.parameters, self.buffers, asked)
        return self.objective.measure_each(outputs, batch, shared=shared, each=self._each)

    @torch.no_grad()
    def evaluate(self, batch: Batch, *, averaged: bool) -> tuple[Tensor, Tensor]:
        """The same in evaluation mode for rows that all trials share, by the averaged weights or the plain ones."""
        self._template.eval()
        average = (self.average if averaged else None) or {}
        parameters = self.parameters | {name: average[name] for name in self.parameters.keys() & average.keys()}
        buffers = self.buffers | {name: average[name] for name in self.buffers.keys() & average.keys()}
        outputs = self._outputs(parameters, buffers, self.objective.asks(batch, shared=True, each=self._each))
        return self.objective.measure_each(outputs, batch, shared=True, each=self._each)

    def _outputs(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], asked: Asked) -> Any:
        """(T, B, outputs), or what the model gives of several tensors, each (T, B, ...)."""
        state = (dict(parameters), dict(buffers))
        if self._wide:
            assert not asked.tensors  # nothing that is asked of wide models
            assert not asked.options
            rows = asked.rows if asked.shared else asked.rows.flatten(1, 2)
            return functional_call(self._template, state, (rows,)).transpose(1, 2)
        structure: list[Any] = []

        def one(parameters: Any, buffers: Any, rows: Tensor, tensors: Any) -> tuple[Tensor, ...]:
            given = functional_call(self._template, (parameters, buffers), (rows,), {**tensors, **asked.options})
            leaves, spec = tree_flatten(given)
            structure[:] = [spec, [isinstance(leaf, Tensor) for leaf in leaves]]
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))  # None, which vmap returns from nothing

        dim = None if asked.shared else 1
        batched = vmap(one, in_dims=(0, 0, dim, dim), randomness="different")
        found = iter(batched(*state, asked.rows, dict(asked.tensors)))
        spec, there = structure
        return tree_unflatten([next(found) if is_tensor else None for is_tensor in there], spec)

    @torch.no_grad()
    def update_average(self) -> None:
        """Take the weights as they are now into the moving averages, as MovingAverage does."""
        if self.average is None:
            return
        stacks = self.parameters | self.buffers
        decay = decay_at(self._decay, self.num_averaged)
        average_into(list(self.average.values()), [stacks[name] for name in self.average], decay=decay)
        self.num_averaged += 1

    def finite(self) -> Tensor:
        """(T,): whether all weights of each trial are neither NaN nor infinite."""
        whole = [weight.detach().flatten(1).isfinite().all(1) for weight in self.parameters.values()]
        return torch.stack(whole).all(0)

    # -- one trial's state, as the ordinary loop has it ------------------------------------------------------------

    def weights(self, place: int, *, averaged: bool = False) -> dict[str, Tensor]:
        """The state dict of one trial's model, copied to the CPU; of its moving average where that is asked for."""
        stacks = self.parameters | self.buffers | ((self.average if averaged else None) or {})
        return {key: stacks[name][place].detach().to("cpu", copy=True) for key, name in self._names.items()}

    def averages(self, place: int) -> dict[str, Tensor] | None:
        """The state dict of one trial's MovingAverage; None where nothing is averaged."""
        if self.average is None:
            return None
        weights = {f"{PREFIX}{key}": weight for key, weight in self.weights(place, averaged=True).items()}
        return {NUM_AVERAGED: torch.tensor(self.num_averaged), **weights}

    @torch.no_grad()
    def load(self, place: int, weights: dict[str, Tensor], averages: dict[str, Tensor] | None) -> None:
        """Give one trial the state that `weights` and `averages` have returned, or that the ordinary loop has saved."""
        stacks = self.parameters | self.buffers
        for key, name in self._names.items():
            stacks[name][place].copy_(weights[key])
        if self.average is not None and averages is not None:
            self.num_averaged = int(averages[NUM_AVERAGED])
            for key, name in self._names.items():
                if name in self.average:
                    self.average[name][place].copy_(averages[f"{PREFIX}{key}"])


def _differing(recipes: Sequence[Recipe], device: torch.device) -> dict[str, Tensor]:
    """The objective's fields that the trials have different values of: (T,) each."""
    values = {
        name: [getattr(recipe.objective, name) for recipe in recipes]
        for name in type(recipes[0].objective).model_fields
    }
    return {
        name: torch.tensor(own, device=device) for name, own in values.items() if any(value != own[0] for value in own)
    }


def num_parameters(model: nn.Module) -> int:
    """Parameters of one trial's model."""
    return sum(parameter.numel() for parameter in model.parameters())

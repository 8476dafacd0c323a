"""The batched model of fused trials: all their weights in stacked tensors, computed at once.

Shapes: T trials, B rows of the batch, M metrics of the objective.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from cluster.recipe.recipe import Recipe
from cluster.tuning.fused.layers import KINDS, free_dropout, widen
from nn_models.objectives import Classification
from nn_models.signature import Signature


class FusedModel:
    """T models of one kind. `parameters` and `buffers` hold (T, *shape) for a shape of one model's.

    The losses of different trials have nothing in common, so the gradient of their sum is each one's own: autograd
    runs over the batched operations as they are, which costs less than vmap over `torch.func.grad`.
    """

    def __init__(
        self, recipes: Sequence[Recipe], signature: Signature, *, device: torch.device, wide: bool | None = None
    ) -> None:
        """`wide` models have the layers of `fused.layers`, others run by vmap; by default, those of KINDS are wide."""
        models = []
        for recipe in recipes:
            torch.manual_seed(recipe.train.seed)  # the weights that the trial would start with alone
            models.append(recipe.model.build(signature).to(device))
        self.plain = copy.deepcopy(models[0])  # not batched: to evaluate one trial's best weights with
        self._template = models[0]
        self._wide = recipes[0].model.kind in KINDS if wide is None else wide
        free_dropout(self._template, models)
        self.parameters, self.buffers = stack_module_state(models)
        if self._wide:
            self._template = copy.deepcopy(self._template)
            widen(self._template)
        self.average: dict[str, Tensor] | None = None  # moving averages of the parameters
        self.num_averaged = 0
        self._decay = recipes[0].train.ema_decay
        if self._decay:
            self.average = {name: weight.detach().clone() for name, weight in self.parameters.items()}

        self.objective = recipes[0].supervised.build(signature.num_outputs)
        smoothings = [getattr(recipe.objective, "label_smoothing", 0.0) for recipe in recipes]
        differ = len(set(smoothings)) > 1
        self._smoothings = torch.tensor(smoothings, device=device)
        self._ends = (0.0, 1.0) if differ else (smoothings[0],)

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
        self._smoothings = self._smoothings.index_select(0, index)

    # -- computing -------------------------------------------------------------------------------------------------

    def measure(self, inputs: Tensor, targets: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
        """Losses (T,), differentiable, and metrics (T, M), float64: sums over rows, in training mode.

        All trials get the same rows, inputs (B, …), or where they are not `shared` each its own: (B, T, …).
        """
        self._template.train()
        return self._losses(self._outputs(self.parameters, inputs, shared=shared), targets, shared=shared)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The same in evaluation mode for rows (B, …), by the averaged weights where there are such."""
        self._template.eval()
        outputs = self._outputs(self.average or self.parameters, inputs, shared=True)
        return self._losses(outputs, targets, shared=True)

    def _outputs(self, parameters: Mapping[str, Tensor], inputs: Tensor, *, shared: bool) -> Tensor:
        """(T, B, outputs)."""
        state = (dict(parameters), self.buffers)
        if self._wide:
            rows = inputs if shared else inputs.flatten(1, 2)
            return functional_call(self._template, state, (rows,)).transpose(1, 2)

        def one(parameters: Any, buffers: Any, inputs: Tensor) -> Tensor:
            return functional_call(self._template, (parameters, buffers), (inputs,))

        rows_dim = None if shared else 1
        return vmap(one, in_dims=(0, 0, rows_dim), randomness="different")(*state, inputs)

    def _losses(self, outputs: Tensor, targets: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
        """What `measure` returns, of outputs (T, B, …)."""
        if not isinstance(self.objective, Classification):
            return vmap(self._one, in_dims=(0, None if shared else 1))(outputs, targets)
        # the same as Classification says, but without vmap, by which it takes as long as a small model
        scores = outputs.transpose(1, 2)  # (T, classes, B), which torch goes through much faster than classes last
        labels = targets.expand(len(outputs), -1) if shared else targets.t()
        rows = [F.cross_entropy(scores, labels, reduction="none", label_smoothing=end) for end in self._ends]
        losses = rows[0].sum(1)
        if len(rows) > 1:  # torch's label_smoothing is no tensor, but the loss is linear in it
            losses = torch.lerp(losses, rows[1].sum(1), self._smoothings)
        right = scores.detach().max(1).indices == labels  # argmax takes twenty times as long as max
        return losses, right.sum(1, dtype=torch.float64).unsqueeze(1)

    def _one(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One trial's loss () and metrics (M,), by the objective itself."""

        def model(_: Tensor) -> Tensor:  # all that an objective does with a model is to call it
            return outputs

        measured = self.objective.measure(model, outputs, targets)  # type: ignore[arg-type]
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


def num_parameters(model: nn.Module) -> int:
    """Parameters of one trial's model."""
    return sum(parameter.numel() for parameter in model.parameters())

"""The optimizers of fused trials: torch's own, over views of the stacked weights, a parameter group for each trial."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cluster.recipe.optimizers import AnyOptimizerSpec

State = dict[str, Any]


class FusedOptimizers:
    """Every hyperparameter may differ between trials, and each one's state is the state of an ordinary optimizer.

    Measured for 16 nets of 102,000 weights on a CPU: torch's fused Adam, trial by trial, takes 0.06 ms a trial, for its
    weights stay in the cache; the same formula over whole stacks, with rates of shape (T, 1, …), takes 0.4 ms. Its
    `step` takes another 0.06 ms a trial to find out what to call; hence `_Calls`.
    """

    def __init__(self, specs: Sequence[AnyOptimizerSpec], parameters: Mapping[str, Tensor]) -> None:
        """`parameters` are stacked: (T, *shape)."""
        self._specs = list(specs)
        self._stacks = list(parameters.values())
        views = self._views()
        self._optimizer = specs[0].build(views[0])  # type: ignore[arg-type]  # leaves without requires_grad do
        for spec, own in zip(specs[1:], views[1:], strict=True):
            alone = spec.build(own)  # type: ignore[arg-type]
            self._optimizer.add_param_group(dict(alone.param_groups[0]))
            self._optimizer.state.update(alone.state)  # Adagrad has one from the start
        self._calls: _Calls | None = None

    def _views(self) -> list[list[Tensor]]:
        """Each trial's part of each stack."""
        parts = [stack.detach().unbind() for stack in self._stacks]
        return [list(own) for own in zip(*parts, strict=True)]

    def rates(self) -> list[float]:
        """The learning rate of each trial, as it was at the last step."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for stack in self._stacks:
            stack.grad = None

    def step(self, factor: float) -> None:
        """One step by the stacks' gradients; the schedule multiplies each trial's learning rate with `factor`."""
        groups = self._optimizer.param_groups
        for spec, group in zip(self._specs, groups, strict=True):
            group["lr"] = spec.lr * factor
        used = [number for number, stack in enumerate(self._stacks) if stack.grad is not None]
        gradients = [list(own) for own in zip(*(_gradient(self._stacks[number]) for number in used), strict=True)]
        if self._calls is None:
            for group, own in zip(groups, gradients, strict=True):
                for number, gradient in zip(used, own, strict=True):
                    group["params"][number].grad = gradient
            self._optimizer.step()
            for view in (view for group in groups for view in group["params"]):
                view.grad = None
            if type(self._optimizer) in CALLS:  # what they need to know is there after the first step
                self._calls = CALLS[type(self._optimizer)](self._optimizer, used)
        else:
            self._calls(gradients)

    def kept(self, places: Sequence[int], parameters: Mapping[str, Tensor]) -> "FusedOptimizers":
        """Those of the trials at these places, whose weights are now in these stacks."""
        rest = FusedOptimizers([self._specs[place] for place in places], parameters)
        for place, group in zip(places, rest._optimizer.param_groups, strict=True):
            old = self._optimizer.param_groups[place]
            group["lr"] = old["lr"]
            for view, old_view in zip(group["params"], old["params"], strict=True):
                if old_view in self._optimizer.state:
                    state = self._optimizer.state[old_view]
                    # torch's step counts up each, where _AdamCalls had one for all
                    rest._optimizer.state[view] = state | ({"step": state["step"].clone()} if "step" in state else {})
        return rest

    def state_dict(self, place: int) -> State:
        """The state of one trial's optimizer, as if it had been alone."""
        group = self._optimizer.param_groups[place]
        states = [self._optimizer.state.get(view) for view in group["params"]]
        return {
            "state": {number: dict(state) for number, state in enumerate(states) if state is not None},
            "param_groups": [group | {"params": list(range(len(states)))}],
        }

    def load_state_dict(self, place: int, state: State) -> None:
        """Give one trial the state that `state_dict` returns, or that of an ordinary optimizer."""
        group = self._optimizer.param_groups[place]
        alone: torch.optim.Optimizer = self._specs[place].build(group["params"])
        alone.load_state_dict(state)
        for view in group["params"]:
            if view in alone.state:
                self._optimizer.state[view] = alone.state[view]
        group["lr"] = alone.param_groups[0]["lr"]
        self._calls = None


def _gradient(stack: Tensor) -> tuple[Tensor, ...]:
    assert stack.grad is not None
    return stack.grad.unbind()


class _Calls:
    """The calls of torch's fused kernels that a step of an optimizer ends in, their arguments found once."""

    def __init__(self, optimizer: torch.optim.Optimizer, used: Sequence[int]) -> None:
        """`used` are the places in each group of the weights that have gradients."""
        self._groups = optimizer.param_groups
        self._views = [[group["params"][number] for number in used] for group in self._groups]
        self._states = [[optimizer.state.get(view, {}) for view in own] for own in self._views]

    def __call__(self, gradients: list[list[Tensor]]) -> None:
        """One step by each group's gradients."""
        raise NotImplementedError

    def _all(self, name: str) -> list[list[Tensor]]:
        return [[state[name] for state in own] for own in self._states]


class _SGDCalls(_Calls):
    def __init__(self, optimizer: torch.optim.Optimizer, used: Sequence[int]) -> None:
        super().__init__(optimizer, used)
        self._momenta = [
            [state["momentum_buffer"] for state in own] if group["momentum"] else []
            for group, own in zip(self._groups, self._states, strict=True)
        ]

    def __call__(self, gradients: list[list[Tensor]]) -> None:
        for group, views, own, momenta in zip(self._groups, self._views, gradients, self._momenta, strict=True):
            torch._fused_sgd_(
                views,
                own,
                momenta,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
            )


class _AdamCalls(_Calls):
    _kernel = staticmethod(torch._fused_adam_)

    def __init__(self, optimizer: torch.optim.Optimizer, used: Sequence[int]) -> None:
        super().__init__(optimizer, used)
        self._means, self._squares = self._all("exp_avg"), self._all("exp_avg_sq")
        # trials of a group are at the same step: to count up one number for each weight takes as long as the kernel
        self._step: Tensor = self._states[0][0]["step"]
        for state in (state for own in self._states for state in own):
            assert state["step"] == self._step
            state["step"] = self._step

    def __call__(self, gradients: list[list[Tensor]]) -> None:
        self._step += 1
        moments = zip(self._means, self._squares, strict=True)
        for group, views, own, (means, squares) in zip(self._groups, self._views, gradients, moments, strict=True):
            beta1, beta2 = group["betas"]
            self._kernel(
                views,
                own,
                means,
                squares,
                [],
                [self._step] * len(views),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


class _AdamWCalls(_AdamCalls):
    _kernel = staticmethod(torch._fused_adamw_)


CALLS: dict[type[torch.optim.Optimizer], type[_Calls]] = {
    torch.optim.SGD: _SGDCalls,
    torch.optim.Adam: _AdamCalls,
    torch.optim.AdamW: _AdamWCalls,
}


@torch.no_grad()
def gradient_norms(parameters: Mapping[str, Tensor]) -> Tensor:
    """The norms (T,) of each trial's gradients (T, *shape)."""
    gradients = [weight.grad for weight in parameters.values() if weight.grad is not None]
    return torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)


@torch.no_grad()
def clip_gradients(parameters: Mapping[str, Tensor], most: float) -> Tensor:
    """Scale each trial's gradients (T, *shape) to a norm of at most `most`; returns the norms (T,) before."""
    gradients = [weight.grad for weight in parameters.values() if weight.grad is not None]
    norms = gradient_norms(parameters)
    scale = (most / (norms + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ does
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
    return norms

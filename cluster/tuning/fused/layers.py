"""Layers that compute all fused trials at once on plain tensors, without vmap's cost for each operation.

A batch of T trials is one net that is T times as wide. Images have the channels of all trials side by side,
(B, T*C, height, width), and so have rows that a dense layer is yet to see, (B, T*D). What a dense layer returns has its
features first, (T, H, B): the matrices of all trials lie one behind the other in the layer and in its gradients, and
nothing is copied. Elementwise layers, poolings and `flatten(1)` need not know. What has weights takes them stacked,
(T, *shape), and keeps trials apart. Rows that all trials share enter the first layer as they are.

Shapes: T trials, B rows of the batch, D inputs and H outputs of a layer, C and O channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nn_models.recurrence import FusedLayers

# Multiply-adds of one matrix product from which oneDNN's are faster than bmm's, one call for each trial included.
# Measured on one core of an AMD EPYC (Zen 5), where MKL does without AVX-512: 0.5 M half as fast, 3 M 1.3 times as
# fast, 13 M twice as fast. On Intel both are alike.
ONEDNN_WORK = 3 << 20


def widen(template: nn.Module) -> None:
    """Replace the layers of one trial's model by those of many trials, of the same names and parameters' names.

    Raises TypeError for a layer with weights of its own that is none of those known here.
    """
    for name, layer in list(template.named_modules()):
        wide: nn.Module
        if type(layer) is nn.Linear:
            wide = _WideLinear(layer)
        elif type(layer) is nn.Conv2d:
            wide = _WideConv2d(layer)
        elif type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
            wide = _WideBatchNorm(layer)
        elif type(layer) is TensorDropout:
            wide = _WideDropout()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise TypeError(f"no batch of {type(layer).__name__} is known")
        else:
            continue
        _replace(template, name, wide)


def step_by_step(model: nn.Module) -> None:
    """Replace recurrent layers that torch's kernels compute, which vmap cannot batch, by cells of the same weights."""
    for name, layers in list(model.named_modules()):
        if isinstance(layers, FusedLayers):
            _replace(model, name, layers.by_cells())


def free_dropout(template: nn.Module, members: list[nn.Module]) -> None:
    """Make the rates of dropout buffers, of `template` and of each member, so that they are stacked and may differ."""
    for name, layer in list(template.named_modules()):
        if type(layer) is not nn.Dropout:
            continue
        rates = [member.get_submodule(name).p for member in members]
        if any(rates):
            _replace(template, name, TensorDropout())
            for member, rate in zip(members, rates, strict=True):
                layer = TensorDropout()
                layer.rate.fill_(rate)  # type: ignore[arg-type]
                _replace(member, name, layer)


def _replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, layer)


class TensorDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose rate () is a tensor."""

    rate: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the same shape."""
        if not self.training:
            return x
        return x * ((torch.rand_like(x) >= self.rate) / (1 - self.rate))


class _WideDropout(TensorDropout):
    """The same with a rate (T,) for each trial."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, F, B) or (B, T*F, …); the same shape."""
        if not self.training:
            return x
        if x.ndim == 3:
            rate = self.rate.view(-1, 1, 1)
            return x * ((torch.rand_like(x) >= rate) / (1 - rate))
        rate = self.rate.unsqueeze(1)
        kept = torch.rand_like(x).view(len(x), len(rate), -1) >= rate
        return x * (kept / (1 - rate)).view_as(x)


class _WideConv2d(nn.Module):
    """(B, C, height, width) or (B, T*C, height, width), weights (T, O, C, n, n) -> (B, T*O, height, width)."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._channels, self._groups = layer.in_channels, layer.groups
        self._options: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        bias = None if self.bias is None else self.bias.flatten()
        groups = self._groups * (x.shape[1] // self._channels)
        return F.conv2d(x, self.weight.flatten(0, 1), bias, groups=groups, **self._options)


class _WideBatchNorm(nn.Module):
    """(T, F, B) or (B, T*F, …) with statistics (T, F) -> the same: a feature of one trial is one of the wide net."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)
        self._momentum, self._eps = layer.momentum, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.training:
            self.num_batches_tracked += 1
        normalised = F.batch_norm(
            x.flatten(0, 1).unsqueeze(0) if x.ndim == 3 else x,
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            training=self.training,
            momentum=self._momentum or 0.0,
            eps=self._eps,
        )
        return normalised.view_as(x)


class _WideLinear(nn.Module):
    """(B, D), (B, T*D) or (T, D, B), weights (T, H, D) and biases (T, H) -> (T, H, B)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        size, _, depth = self.weight.shape
        if x.ndim == 2 and x.shape[1] == depth:
            return _SharedLinear.apply(x, self.weight, self.bias)
        if x.ndim == 2:
            x = x.view(len(x), size, depth).transpose(0, 1).contiguous().transpose(1, 2)
        return _OwnLinear.apply(x, self.weight, self.bias)


class _SharedLinear(torch.autograd.Function):
    """Rows (B, D), weights (T, H, D), biases (T, H) -> (T, H, B): one product for all trials."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        flat = weight.flatten(0, 1)
        outputs = _product(flat, x) if _onednn(x, flat.numel() * len(x)) else flat @ x.t()
        outputs = outputs.view(*weight.shape[:2], len(x))
        return outputs if bias is None else outputs.add_(bias.unsqueeze(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grad.contiguous().view(-1, len(x))
        grad_x = flat.t() @ weight.flatten(0, 1) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _product(flat, x.t()) if _onednn(x, weight.numel() * len(x)) else flat @ x
            grad_weight = grad_weight.view_as(weight)
        return grad_x, grad_weight, grad.sum(2) if ctx.biased else None


class _OwnLinear(torch.autograd.Function):
    """(T, D, B), weights (T, H, D), biases (T, H) -> (T, H, B)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        if _onednn(x, weight[0].numel() * x.shape[2]):
            outputs = torch.stack([_product(w, rows.t()) for w, rows in zip(weight, x, strict=True)])
            return outputs if bias is None else outputs.add_(bias.unsqueeze(2))
        return torch.bmm(weight, x) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        quick = _onednn(x, weight[0].numel() * x.shape[2])
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if quick:
                grad_x = torch.stack([_product(w.t(), g.t()) for w, g in zip(weight, grad, strict=True)])
            else:
                grad_x = torch.bmm(weight.transpose(1, 2), grad)
        if ctx.needs_input_grad[1]:
            if quick:
                grad_weight = torch.stack([_product(g, rows) for g, rows in zip(grad, x, strict=True)])
            else:
                grad_weight = torch.bmm(grad, x.transpose(1, 2))
        return grad_x, grad_weight, grad.sum(2) if ctx.biased else None


def _onednn(x: Tensor, work: int) -> bool:
    """Whether oneDNN's matrix product is there for such a tensor, and worth its calls."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and work >= ONEDNN_WORK
    return plain and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) times (N, K) transposed -> (M, N), by oneDNN; torch.compile calls the same.

    Each matrix must be contiguous, or be so when it is transposed: with other strides oneDNN may take a thousand times
    as long.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

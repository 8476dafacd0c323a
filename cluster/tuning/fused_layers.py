"""Layers that compute all fused trials at once on plain tensors, without vmap's cost for each operation.

A batch of T trials is one net that is T times as wide: every tensor between the layers has the features, or channels,
of all trials side by side, (B, T*F, …). Elementwise layers, poolings and `flatten(1)` need not know. What has weights
takes them stacked, (T, *shape), and keeps trials apart. Rows that all trials share enter the first layer as they are.

Shapes: T trials, B rows of the batch, D inputs and H outputs of a layer, C and O channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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
        """(B, T*F, …); the same shape."""
        if not self.training:
            return x
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
    """(B, T*F, …) with statistics (T, F) -> the same shape: a feature of one trial is one of the wide net."""

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
        return F.batch_norm(
            x,
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            training=self.training,
            momentum=self._momentum or 0.0,
            eps=self._eps,
        )


class _WideLinear(nn.Module):
    """(B, D) or (B, T*D), weights (T, H, D) and biases (T, H) -> (B, T*H)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        size, _, depth = self.weight.shape
        if x.shape[1] == depth:
            flat = self.weight.flatten(0, 1)
            return _SharedLinear.apply(x, flat, None if self.bias is None else self.bias.flatten())
        return _OwnLinear.apply(x.view(len(x), size, depth), self.weight, self.bias).flatten(1)


class _SharedLinear(torch.autograd.Function):
    """(B, D) times (T*H, D) transposed, plus (T*H,) -> (B, T*H): one product for all trials."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, bias) if _onednn(x, weight.numel() * len(x)) else F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            quick = _onednn(x, weight.numel() * len(x))
            grad_weight = _product(grad.contiguous().t(), x.t()) if quick else grad.t() @ x
        return grad_x, grad_weight, grad.sum(0) if ctx.biased else None


class _OwnLinear(torch.autograd.Function):
    """(B, T, D), weights (T, H, D), biases (T, H) -> (B, T, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.transpose(0, 1).contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.biased = bias is not None
        if _onednn(rows, weight[0].numel() * len(x)):
            biases = [None] * len(weight) if bias is None else bias.unbind()
            return torch.stack([_product(a, w, b) for a, w, b in zip(rows, weight, biases, strict=True)], dim=1)
        if bias is None:
            return torch.bmm(rows, weight.transpose(1, 2)).transpose(0, 1).contiguous()
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2)).transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors  # (T, B, D)
        quick = _onednn(rows, weight[0].numel() * rows.shape[1])
        grads = grad.transpose(0, 1).contiguous()  # (T, B, H)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if quick:
                grad_x = torch.stack([_product(g, w.t()) for g, w in zip(grads, weight, strict=True)], dim=1)
            else:
                grad_x = torch.bmm(grads, weight).transpose(0, 1).contiguous()
        if ctx.needs_input_grad[1]:
            if quick:
                grad_weight = torch.stack([_product(g.t(), a.t()) for g, a in zip(grads, rows, strict=True)])
            else:
                grad_weight = torch.bmm(grads.transpose(1, 2), rows)
        return grad_x, grad_weight, grad.sum(0) if ctx.biased else None


def _onednn(x: Tensor, work: int) -> bool:
    """Whether oneDNN's matrix product is there for such a tensor, and worth its calls."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and work >= ONEDNN_WORK
    return plain and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, D) times (H, D) transposed, plus (H,) -> (B, H), by oneDNN; torch.compile calls the same.

    Each matrix must be contiguous, or be so when it is transposed: with other strides oneDNN may take a thousand times
    as long.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

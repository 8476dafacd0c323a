"""Layers of fused trials: the same as torch's, but quick, or different for each trial, where vmap batches them.

Shapes: T trials, B rows of the batch, D inputs, H outputs of a layer.
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


def fuse_layers(template: nn.Module, members: list[nn.Module]) -> None:
    """Replace layers of `template`, which is built as `members` are, so that vmap over it is quick.

    Dropout gets a buffer for its rate: then trials may have different ones.
    """
    for name, layer in list(template.named_modules()):
        if type(layer) is nn.Linear:
            _replace(template, name, _Linear(layer))
        elif type(layer) is nn.Dropout:
            twins = [member.get_submodule(name) for member in members]
            if not any(twin.p for twin in twins):
                continue
            _replace(template, name, _Dropout())
            for twin in twins:  # to be stacked with the other buffers
                twin.register_buffer("rate", torch.tensor(twin.p), persistent=False)


def _replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, layer)


class _Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose rate is a tensor."""

    rate: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the same shape."""
        if not self.training:
            return x
        kept = torch.rand_like(x, dtype=torch.float32) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


class _Linear(nn.Module):
    """nn.Linear with its very parameters, (..., D) -> (..., H)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H)."""
        # under autocast torch's own linear knows what to compute in half precision
        if x.dim() != 2 or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight, self.bias)
        return _OneLinear.apply(x, self.weight, self.bias)


class _OneLinear(torch.autograd.Function):
    """One trial's layer, whose batch over trials is `_StackedLinear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # never differentiated: vmap calls what follows instead

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        x_dim, weight_dim, bias_dim = in_dims
        assert weight_dim == 0
        assert bias is None or bias_dim == 0
        return _StackedLinear.apply(x if x_dim is None else x.movedim(x_dim, 0), weight, bias), 0


class _StackedLinear(torch.autograd.Function):
    """(T, B, D), or (B, D) where all trials see the same rows, times weights (T, H, D) plus biases (T, H) -> (T, B, H).

    Torch's own batch of linear copies rows that are shared T times, and its gradients come transposed and are copied.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        size, width, depth = weight.shape
        if _onednn(x, width * depth * x.shape[-2]):
            if x.dim() == 2:  # all trials' weights in one matrix
                flat = None if bias is None else bias.reshape(-1)
                return _product(x, weight.view(-1, depth), flat).view(-1, size, width).transpose(0, 1)
            biases = [None] * size if bias is None else bias.unbind()
            return torch.stack([_product(a, w, b) for a, w, b in zip(x, weight, biases, strict=True)])
        rows = x.expand(size, *x.shape[-2:])
        if bias is None:
            return torch.bmm(rows, weight.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        size, width, depth = weight.shape
        onednn = _onednn(x, width * depth * x.shape[-2])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if onednn:
                grad_x = torch.stack([_product(g, w.t()) for g, w in zip(grad, weight, strict=True)])
            else:
                grad_x = torch.bmm(grad, weight)
            grad_x = grad_x if x.dim() == 3 else grad_x.sum(0)
        if ctx.needs_input_grad[1]:
            if not onednn:
                grad_weight = torch.bmm(grad.transpose(1, 2), x.expand(size, *x.shape[-2:]))
            elif x.dim() == 2:
                together = grad.transpose(0, 1).reshape(-1, size * width)
                grad_weight = _product(together.t(), x.t()).view(size, width, depth)
            else:
                grad_weight = torch.stack([_product(g.t(), a.t()) for g, a in zip(grad, x, strict=True)])
        return grad_x, grad_weight, grad.sum(1) if ctx.biased else None


def _onednn(x: Tensor, work: int) -> bool:
    """Whether oneDNN's matrix product is there for such a tensor, and worth its calls."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and work >= ONEDNN_WORK
    return plain and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, D) times (H, D) transposed -> (B, H), by oneDNN; what torch.compile calls, too."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

"""The peephole LSTM's recurrence and its derivative (backpropagation through time), written down step by step.

Shapes: T steps, B rows, H units; gates stand in the order i, f, g, o. Rows come last, so that each gate's numbers lie
together and a step is a dozen passes over memory that lies in one piece.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class PeepholeRecurrence(Function):
    """All steps of a peephole LSTM whose inputs are projected: see `recurrence.PeepholeCell`.

    An operation at a time, autograd would keep and call some forty functions a step. Here a step back is one product
    and six passes over what a step forward has left, and the gradient of U is one product over all steps.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, peepholes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Projected inputs (T, 4 H, B), states (H, B), U (4 H, H), peepholes (3, H) -> h and c (T, H, B)."""
        num_steps, width, num_rows = projected.shape
        size = width // 4
        all_h, all_c = (projected.new_empty(num_steps + 1, size, num_rows) for _ in range(2))
        all_h[0], all_c[0] = h, c
        gates = projected.clone(memory_format=torch.contiguous_format)
        squashed = torch.empty_like(all_c[1:])  # tanh(c)
        of_if, of_o = peepholes[:2, :, None], peepholes[2][:, None]
        both = gates[:, : 2 * size].view(num_steps, 2, size, num_rows)
        i, f, g, o = gates.view(num_steps, 4, size, num_rows).unbind(1)
        views = (all_h[:-1], all_h[1:], all_c[:-1], all_c[1:], gates, squashed, both, i, f, g, o)
        for before_h, h, before_c, c, z, tanh_c, i_f, i, f, g, o in zip(*(v.unbind() for v in views), strict=True):
            z.addmm_(weight_hh, before_h)
            i_f.addcmul_(of_if, before_c).sigmoid_()
            g.tanh_()
            torch.mul(f, before_c, out=c).addcmul_(i, g)
            o.addcmul_(of_o, c).sigmoid_()
            torch.tanh(c, out=tanh_c)
            torch.mul(o, tanh_c, out=h)
        ctx.save_for_backward(all_h, all_c, gates, squashed, weight_hh, peepholes)
        return all_h[1:], all_c[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_c: Tensor) -> tuple[Tensor, ...]:
        """The derivative of each argument, from those of all h and c."""
        all_h, all_c, gates, tanh_c, weight_hh, peepholes = ctx.saved_tensors
        num_steps, size, num_rows = tanh_c.shape
        of_i, of_f, of_o = peepholes[:, :, None]
        i, f, g, o = gates.view(num_steps, 4, size, num_rows).unbind(1)
        before_c = all_c[:-1]
        # what a step's derivatives are multiples of, for all steps at once: of dL/dc[t] for i, f, g, of dL/dh[t] for o
        slopes = torch.empty(num_steps, 4, size, num_rows, dtype=gates.dtype, device=gates.device)
        to_i, to_f, to_g, to_o = slopes.unbind(1)
        torch.mul(i * g, 1 - i, out=to_i)
        torch.mul(before_c * f, 1 - f, out=to_f)
        torch.mul(i, 1 - g * g, out=to_g)
        torch.mul(tanh_c * o, 1 - o, out=to_o)
        from_h = (o * (1 - tanh_c * tanh_c)).addcmul_(to_o, of_o)  # dc[t] by dh[t]
        back = torch.addcmul(f, to_i, of_i).addcmul_(to_f, of_f)  # dc[t-1] by dc[t]
        dz = torch.empty_like(slopes)
        flat = dz.view(num_steps, 4 * size, num_rows)
        dc, dh = torch.zeros_like(all_c[0]), torch.zeros_like(all_h[0])
        transposed = weight_hh.t()
        views = (grad_h, grad_c, from_h, slopes[:, :3], to_o, back, dz[:, :3], dz[:, 3], flat)
        for d_h, d_c, by_h, slope, slope_o, by_c, d_ifg, d_o, z in zip(
            *(reversed(v.unbind()) for v in views), strict=True
        ):
            dh = dh.add_(d_h)
            dc = dc.add_(d_c).addcmul_(dh, by_h)
            torch.mul(slope, dc, out=d_ifg)
            torch.mul(slope_o, dh, out=d_o)
            dc.mul_(by_c)
            torch.mm(transposed, z, out=dh)
        d_weight = torch.einsum("tgb,thb->gh", flat, all_h[:-1])
        d_peepholes = torch.stack(
            [(dz[:, gate] * c).sum((0, 2)) for gate, c in ((0, before_c), (1, before_c), (3, all_c[1:]))]
        )
        return flat, dh, dc, d_weight, d_peepholes

"""The peephole LSTM's recurrence and its derivative (backpropagation through time), written down step by step.

Shapes: T steps, B rows, H units; gates stand in the order i, f, g, o.

A small net's step costs what calling its operations costs, about a microsecond each on a CPU and several on a GPU. So
a step is as few of them as can be, all in place: tanh(x) = 1 - 2 sigmoid(-2 x) makes every squashing a sigmoid, which
torch computes five times as fast, and for several gates at once; it differs from tanh by a rounding of 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # (a, s) -> a s (1 - s)


def gate_scales(num_units: int, like: Tensor) -> Tensor:
    """(4 H,): what each gate's weights are multiplied by for PeepholeRecurrence; powers of 2, so nothing rounds."""
    scales = like.new_ones(4, num_units)
    scales[2] = -2.0
    return scales.flatten()


class PeepholeRecurrence(Function):
    """All steps of a peephole LSTM whose inputs are projected: see `recurrence.PeepholeCell`.

    An operation at a time, autograd would keep and call some forty functions a step. Here a step is eight operations
    forward, and four back over slopes that are computed of all steps at once; the gradient of U is one product.
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, peepholes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Projected inputs (T, B, 4 H), states (B, H), U (4 H, H), peepholes (3, H) -> h and c (T, B, H).

        Projected inputs and U are to be scaled by `gate_scales`.
        """
        num_steps, num_rows, width = projected.shape
        size = width // 4
        all_h, all_c = (projected.new_empty(num_steps + 1, num_rows, size) for _ in range(2))
        all_h[0], all_c[0] = h, c
        # i, f, s, o, d of each step, where g = 1 - 2 s and tanh(c) = 1 - 2 d
        squashed = projected.new_empty(num_steps, num_rows, 5 * size)
        squashed[..., :width], squashed[..., width:] = projected, 0
        apart = squashed.unflatten(2, (5, size))
        of_if, of_od = peepholes[:2], torch.stack([peepholes[2], torch.full_like(peepholes[2], -2.0)])
        transposed, product = weight_hh.t(), torch.empty_like(h)
        steps = (
            *(all_h[:-1], all_h[1:], all_c[:-1], all_c[1:], all_c[:-1, :, None], all_c[1:, :, None]),
            *(squashed[..., :width], squashed[..., : 3 * size], squashed[..., 3 * size :]),
            *(apart[:, :, :2], apart[:, :, 3:], *apart.unbind(2)),
        )
        for before_h, h, before_c, c, of_before, of_c, z, ifs, both, i_f, o_d, i, f, s, o, d in zip(
            *(values.unbind() for values in steps), strict=True
        ):
            z.addmm_(before_h, transposed)
            i_f.addcmul_(of_if, of_before)
            ifs.sigmoid_()
            torch.addcmul(i, i, s, value=-2, out=product)  # i g
            torch.addcmul(product, f, before_c, out=c)
            o_d.addcmul_(of_od, of_c)
            both.sigmoid_()
            torch.addcmul(o, o, d, value=-2, out=h)
        ctx.save_for_backward(all_h, all_c, squashed, weight_hh, peepholes)
        ctx.set_materialize_grads(False)
        return all_h[1:], all_c[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None) -> tuple[Tensor, ...]:
        """The derivative of each argument, from those of all h and c."""
        all_h, all_c, squashed, weight_hh, peepholes = ctx.saved_tensors
        num_steps, _, size = all_h[1:].shape
        before_h, before_c = all_h[:-1], all_c[:-1]
        i, f, s, o, d = squashed.unflatten(2, (5, size)).unbind(2)
        # What a step's derivatives are multiples of, for all steps at once: dc[t-1], i, f, s of dL/dc[t], o of dL/dh[t]
        slopes = torch.empty_like(squashed)
        by_c, to_i, to_f, to_s, to_o = slopes.unflatten(2, (5, size)).unbind(2)
        sigmoid_backward(torch.rsub(s, 1, alpha=2), i, grad_input=to_i)
        sigmoid_backward(before_c, f, grad_input=to_f)
        sigmoid_backward(i, s, grad_input=to_s).mul_(-2)
        sigmoid_backward(torch.rsub(d, 1, alpha=2), o, grad_input=to_o)
        from_h = torch.ops.aten.sigmoid_backward(o, d).mul_(4).addcmul_(to_o, peepholes[2])  # dc[t] by dh[t]
        torch.addcmul(f, to_i, peepholes[0], out=by_c).addcmul_(to_f, peepholes[1])

        found = torch.empty_like(slopes)  # dL/dc[t-1] and of i, f, s, o, of each step
        dz = found[..., size:]
        dc = torch.zeros_like(all_c[0])
        if grad_h is None:
            grad_h = torch.zeros_like(before_h)
        dh = grad_h[-1].clone()
        cells = [None] * num_steps if grad_c is None else grad_c.unbind()
        grads_before = [torch.zeros_like(dh), *grad_h.unbind()[:-1]]
        of_c = (slopes[..., : 4 * size].unflatten(2, (4, size)), found[..., : 4 * size].unflatten(2, (4, size)))
        steps = (from_h, *of_c, to_o, found[..., 4 * size :], found[..., :size], dz)
        for d_c, before, by_h, slope, d_cifs, slope_o, d_o, d_before, z in zip(
            reversed(cells), reversed(grads_before), *(reversed(values.unbind()) for values in steps), strict=True
        ):
            dc.addcmul_(dh, by_h)
            if d_c is not None:
                dc.add_(d_c)
            torch.mul(slope, dc[:, None], out=d_cifs)
            torch.mul(slope_o, dh, out=d_o)
            torch.addmm(before, z, weight_hh, out=dh)
            dc = d_before
        d_weight = dz.flatten(0, 1).t() @ before_h.flatten(0, 1)
        of_if = (found[..., size : 3 * size].unflatten(2, (2, size)) * before_c[:, :, None]).sum((0, 1))
        of_o = (found[..., 4 * size :] * all_c[1:]).sum((0, 1))
        return dz, dh, dc, d_weight, torch.cat([of_if, of_o[None]])

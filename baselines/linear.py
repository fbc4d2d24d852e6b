"""The plain linear layer as an autograd function of our own: what methods that keep its forward pass build on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsegrad.autocast import like_linear
from sparsegrad.products import LiveRows


@like_linear
class LinearFunction(torch.autograd.Function):
    """`Y = X W^T + b` with its exact gradients, of which backward skips rows of dL/dY that are zero (`LiveRows`)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, k: int | None) -> Tensor:
        """x (T, D_in), weight (D_out, D_in) -> (T, D_out); `k` is what a subclass's backward keeps."""
        ctx.save_for_backward(x, weight)
        ctx.k = k
        return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX, dL/dW, dL/db."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        live = LiveRows(dy)
        x, dy = live.of(x), live.of(dy)
        dweight = dy.T @ x if need_weight else None
        dx = live.back(dy @ weight) if need_x else None
        return dx, dweight, dy.sum(0) if need_bias else None, None

"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199): only the biases train."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from baselines.adapter import AdapterLinear, AdapterMethod
from baselines.method import LayerBytes, MethodError, size
from sparsegrad.autocast import like_linear
from sparsegrad.products import LiveRows


@like_linear
class BiasFunction(torch.autograd.Function):
    """`Y = X W^T + b` with W frozen: its gradients need dL/dY and W, and nothing of X."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x (T, D_in), weight (D_out, D_in), bias (D_out,) or None -> (T, D_out)."""
        ctx.save_for_backward(weight)
        return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), dL/db (D_out,)."""
        (weight,) = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad
        live = LiveRows(dy)
        dy = live.of(dy)
        dx = live.back(dy @ weight) if need_x else None
        return dx, None, dy.sum(0) if need_bias else None


class BitFitLinear(AdapterLinear):
    """A linear layer of which the bias alone trains, where it has one: (..., D_in) -> (..., D_out)."""

    def of_rows(self, x):
        """(T, D_in) -> (T, D_out)."""
        return BiasFunction.apply(x, self.weight, self.bias)

    def own(self):
        """The bias."""
        return () if self.bias is None else (self.bias,)

    def effective_weight(self):
        """The weight itself."""
        return self.weight.detach()


class BitFit(AdapterMethod):
    """BitFit on the target layers. It adds nothing to a model: a target layer without a bias stays as it is.

    Where no target layer has a bias (LLaMA and its likes have none anywhere) nothing of this method would train, and
    the model would be `head` under another name: it is refused.
    """

    name = "bitfit"

    def builder(self, model):
        """Of `BitFitLinear`s."""
        return BitFitLinear

    def check_model(self, model):
        """Also raise `MethodError` where no target layer has a bias."""
        super().check_model(model)
        names = self.target_names()
        if all(model.get_submodule(name).bias is None for name in names):
            raise MethodError(
                f"bitfit trains the biases of the target layers, and none of the {len(names)} has one "
                f"({names[0]!r} for one): choose other targets, or another method"
            )

    def formula(self, shape, tokens, dtype):
        """W; the bias, which is what trains here, with gradient and moments; nothing is saved beside them."""
        bias = size(shape[0], dtype)
        return LayerBytes(
            parameter=size(shape[0] * shape[1], dtype) + bias, gradient=bias, optimizer=2 * bias, keeps_input=False
        )

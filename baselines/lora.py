"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685): `Y = X W^T + b + (alpha / r) X A^T B^T` with W frozen."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baselines.adapter import AdapterLinear, AdapterMethod
from baselines.method import Knob, LayerBytes, size
from sparsegrad.autocast import like_linear
from sparsegrad.products import LiveRows


@like_linear
class LoRAFunction(torch.autograd.Function):
    """The layer in one function, so that no (T, D) temporary exists besides Y, dL/dY and dL/dX."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        """x (T, D_in), weight (D_out, D_in), A (r, D_in), B (D_out, r) -> (T, D_out)."""
        a, b = A.to(x.dtype), B.to(x.dtype)
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        low = x @ a.T
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, A, B, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX; dL/dA (r, D_in), dL/dB (D_out, r); dL/db; dL/dW only where W trains."""
        x, weight, A, B, low = ctx.saved_tensors
        live = LiveRows(dy)
        x, low, dy = live.of(x), live.of(low), live.of(dy)
        a, b = A.to(x.dtype), B.to(x.dtype)
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        dx = dweight = dbias = da = db = None
        if need_b:
            db = (dy.T @ low).mul_(ctx.scaling).to(B.dtype)
        if need_x or need_a:
            dlow = (dy @ b).mul_(ctx.scaling)
        if need_a:
            da = (dlow.T @ x).to(A.dtype)
        if need_x:
            dx = dy @ weight
            dx = live.back(dx.addmm_(dlow, a))
        if need_weight:
            dweight = dy.T @ x
        if need_bias:
            dbias = dy.sum(0)
        return dx, dweight, dbias, da, db, None


class LoRALinear(AdapterLinear):
    """A frozen linear layer plus a low-rank update: (..., D_in) -> (..., D_out).

    A is initialised as peft does it (Kaiming uniform with a = sqrt(5)) and B with zeros, so that nothing changes at
    first. `weight` is the source's own storage.

    Args:
        linear: nn.Linear or Conv1D.
        rank: r.
        alpha: the update is scaled by alpha / r.
        dtype: dtype of A and B; products are made in the input's.
    """

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dtype: torch.dtype | None = None):
        super().__init__(linear)
        self.rank = rank
        self.scaling = alpha / rank
        options = {"dtype": dtype or self.weight.dtype, "device": self.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def of_rows(self, x: Tensor) -> Tensor:
        """(T, D_in) -> (T, D_out)."""
        return LoRAFunction.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)

    def own(self) -> tuple[nn.Parameter, ...]:
        """A and B."""
        return self.lora_A, self.lora_B

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W + (alpha / r) B A` (D_out, D_in)."""
        return self.weight + (self.lora_B @ self.lora_A).mul_(self.scaling).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shape, bias and rank."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


class LoRA(AdapterMethod):
    """LoRA on the target layers; alpha = 2 r, as is common practice."""

    name = "lora"
    knob = Knob("rank", default=7)
    alpha_over_rank = 2.0
    layer_class: ClassVar[type[LoRALinear]] = LoRALinear

    def builder(self, model):
        """Of `layer_class`es of the budget's rank."""
        alpha = self.alpha_over_rank * self.budget
        return lambda layer: self.layer_class(layer, self.budget, alpha, self.setting.own_dtype(layer.weight.dtype))

    def layer_params(self, shape):
        """r (D_in + D_out)."""
        return self.budget * (shape[0] + shape[1])

    def formula(self, shape, tokens, dtype):
        """W; A and B with gradient and moments; X A^T (T, r) is saved beside X."""
        own = size(self.layer_params(shape), self.setting.own_dtype(dtype))
        return LayerBytes(
            parameter=size(shape[0] * shape[1], dtype) + own,
            gradient=own,
            optimizer=2 * own,
            activation=size(tokens * self.budget, dtype),
        )

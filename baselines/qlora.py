"""QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314): LoRA on a weight that is kept in 4 bits.

`Y = X W4^T + b + (alpha / r) X A^T B^T` (the paper's equation 5), where W4 is made from its codes for each product and
let go again: in forward, and anew in backward.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baselines import nf4
from baselines.lora import LoRA, LoRALinear
from baselines.method import size
from sparsegrad.adapted import adapted_layers
from sparsegrad.autocast import like_linear
from sparsegrad.products import LiveRows

CODES = ("weight_codes", "weight_magnitudes", "weight_scales", "weight_mean")


@like_linear
class QLoRAFunction(torch.autograd.Function):
    """`LoRAFunction` with `layer.dense` for W: X and X A^T are saved, and nothing of W's size."""

    @staticmethod
    def forward(ctx, x, bias, A, B, layer):
        """x (T, D_in), A (r, D_in), B (D_out, r) -> (T, D_out)."""
        a, b = A.to(x.dtype), B.to(x.dtype)
        weight = layer.dense(x.dtype)
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        del weight
        low = x @ a.T
        y.addmm_(low, b.T, alpha=layer.scaling)
        ctx.save_for_backward(x, A, B, low)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), dL/db (D_out,), dL/dA (r, D_in), dL/dB (D_out, r)."""
        x, A, B, low = ctx.saved_tensors
        layer = ctx.layer
        live = LiveRows(dy)
        x, low, dy = live.of(x), live.of(low), live.of(dy)
        need_x, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        dx = dbias = da = db = None
        if need_b:
            db = (dy.T @ low).mul_(layer.scaling).to(B.dtype)
        if need_x or need_a:
            dlow = (dy @ B.to(dy.dtype)).mul_(layer.scaling)
        if need_a:
            da = (dlow.T @ x).to(A.dtype)
        if need_x:
            dx = dy @ layer.dense(dy.dtype)
            dx = live.back(dx.addmm_(dlow, A.to(dy.dtype)))
        if need_bias:
            dbias = dy.sum(0)
        return dx, dbias, da, db, None


class QLoRALinear(LoRALinear):
    """A frozen linear layer in NF4 plus a low-rank update: (..., D_in) -> (..., D_out).

    Args:
        linear: nn.Linear or Conv1D; its weight is not kept.
        rank, alpha, dtype: as for `LoRALinear`.
        tables: what all layers of a model share.
    """

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dtype: torch.dtype | None, tables: nf4.Tables):
        super().__init__(linear, rank, alpha, dtype)
        self.dtype, self.tables = self.weight.dtype, tables
        for name, stored in zip(CODES, nf4.quantize(self.weight, tables), strict=True):
            # As bytes, float32 ones too: a cast of the model must not round what its weights are made of.
            stored = stored.reshape(-1).view(torch.uint8)
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))
        del self.weight

    def _apply(self, fn, recurse=True):
        """What a cast or a move of the model means for what is no parameter: the dtype of W, and the tables."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device)).dtype
        super()._apply(fn, recurse)
        if self.tables.normal.device != self.weight_codes.device:
            self.tables = nf4.Tables.made(self.weight_codes.device)
        return self

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W4 (D_out, D_in)."""
        codes, magnitudes, scales, mean = (getattr(self, name) for name in CODES)
        stored = (codes, magnitudes, scales.view(torch.float32), mean.view(torch.float32))
        return nf4.dequantize(stored, self.tables, (self.out_features, self.in_features), dtype)

    def of_rows(self, x: Tensor) -> Tensor:
        """(T, D_in) -> (T, D_out)."""
        return QLoRAFunction.apply(x, self.bias, self.lora_A, self.lora_B, self)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W4 + (alpha / r) B A` (D_out, D_in)."""
        return self.dense(self.dtype) + (self.lora_B @ self.lora_A).mul_(self.scaling).to(self.dtype)


class QLoRA(LoRA):
    """QLoRA on the target layers; what is no target stays in the model's dtype."""

    name = "qlora"
    layer_class = QLoRALinear

    def builder(self, model):
        """Of layers of the budget's rank, which share their tables."""
        tables = nf4.Tables.made(next(model.parameters()).device)
        alpha = self.alpha_over_rank * self.budget
        return lambda layer: QLoRALinear(layer, self.budget, alpha, self.setting.own_dtype(layer.weight.dtype), tables)

    def basis_tensors(self, model):
        """The tables."""
        for _, layer in adapted_layers(model):
            yield from layer.tables.tensors()

    def counts(self, model, shapes):
        """As for LoRA: a weight counts its entries, not the bytes that they are in."""
        counted = super().counts(model, shapes)
        stored = sum(getattr(layer, name).numel() for _, layer in adapted_layers(model) for name in CODES)
        return replace(counted, total_params=counted.total_params - stored + sum(math.prod(s) for s in shapes))

    def formula(self, shape, tokens, dtype):
        """As LoRA's, W in 0.516 bytes an entry; the tables are shared."""
        entries = shape[0] * shape[1]
        lora = super().formula(shape, tokens, dtype)
        stored = lora.parameter - size(entries, dtype) + nf4.stored_bytes(entries)
        return replace(lora, parameter=stored, basis=4 * (16 + 256 + 2 * 256))

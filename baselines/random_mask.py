"""A fixed random support: k entries of each weight train, drawn once. The honest floor of every selective method."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baselines.method import EntryMethod, LayerBytes, size
from sparsegrad.adapted import AdaptedLinear, adapted_layers, is_transposed, replace_layers, source_weight
from sparsegrad.products import LiveRows, Selection

# The rows of the weight gradient that exist at once are an eighth of them, rounded up.
BLOCK_FRACTION = 8


def position_dtype(count: int) -> torch.dtype:
    """The narrowest index type for positions in a weight of `count` entries."""
    return torch.int32 if count <= torch.iinfo(torch.int32).max else torch.int64


class MaskFunction(torch.autograd.Function):
    """`Y = X W^T + b` where k entries of W are `values`; their gradient is the matching entries of `dL/dY^T X`."""

    @staticmethod
    def forward(ctx, x, values, weight, bias, index, selection):
        """x (T, D_in), values (k,), weight (D_out, D_in) holding them at index (k,) -> (T, D_out)."""
        ctx.save_for_backward(x, weight, index)
        ctx.selection, ctx.values_dtype = selection, values.dtype
        return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX, dL/dvalues (k,), dL/db."""
        x, weight, index = ctx.saved_tensors
        live = LiveRows(dy)
        x, dy = live.of(x), live.of(dy)
        need_x, need_values, _, need_bias, _, _ = ctx.needs_input_grad
        dvalues = ctx.selection.select(dy, x, index).to(ctx.values_dtype) if need_values else None
        dx = live.back(dy @ weight) if need_x else None
        return dx, dvalues, None, dy.sum(0) if need_bias else None, None, None


class MaskedLinear(AdaptedLinear):
    """A linear layer of which only the entries at `index` train: (..., D_in) -> (..., D_out).

    `values` (k,) are what the optimizer sees, moments and all; the forward pass writes them into the frozen weight.

    Args:
        linear: nn.Linear or Conv1D; the weight's storage is shared.
        index: sorted flat positions in (D_out, D_in), int32 or int64, (k,).
        dtype: dtype of the values; None for the weight's. A wider one keeps updates that the weight would round away.
    """

    index: Tensor

    def __init__(self, linear: nn.Module, index: Tensor, dtype: torch.dtype | None = None):
        weight = source_weight(linear).contiguous()
        super().__init__(weight.shape[1], weight.shape[0], is_transposed(linear))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.register_buffer("index", index)
        self.values = nn.Parameter(torch.take(weight, index.long()).to(dtype or weight.dtype))
        self.selection = Selection(index, tuple(weight.shape), max(1, -(-self.out_features // BLOCK_FRACTION)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        # Through .data: writing the same values again must not invalidate the weight that an earlier forward saved.
        self.weight.data.put_(self.index.long(), self.values.detach().to(self.weight.dtype))
        rows = x.reshape(-1, self.in_features)
        y = MaskFunction.apply(rows, self.values, self.weight, self.bias, self.index, self.selection)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The weight with the trained entries in place."""
        return self.weight.detach().put_(self.index.long(), self.values.to(self.weight.dtype))

    def extra_repr(self) -> str:
        """Shape, bias and budget."""
        return f"{super().extra_repr()}, nnz={self.values.numel()}"


class RandomMask(EntryMethod):
    """k entries of each target weight, drawn once without looking at any gradient, with moments for those alone."""

    name = "random-mask"

    def prepare(self, model, batches):
        """Draw the supports from the setting's seed, replace the target layers, set what trains."""
        self.check_model(model)
        generator = torch.Generator().manual_seed(self.setting.seed)

        def build(layer: nn.Module) -> MaskedLinear:
            weight = source_weight(layer)
            chosen = torch.randperm(weight.numel(), generator=generator)[: self.entries(tuple(weight.shape))]
            positions = chosen.sort().values.to(weight.device, position_dtype(weight.numel()))
            return MaskedLinear(layer, positions, self.setting.own_dtype(weight.dtype))

        replace_layers(model, self.target_names(), build)
        layers = [layer for _, layer in adapted_layers(model)]
        self.freeze(model, [layer.values for layer in layers], [layer.weight for layer in layers])

    def basis_tensors(self, model):
        """The positions of the trained entries."""
        return (layer.index for _, layer in adapted_layers(model))

    def formula(self, shape, tokens, dtype):
        """W; k values with gradient and moments; k int32 positions."""
        k = self.entries(shape)
        own = size(k, self.setting.own_dtype(dtype))
        return LayerBytes(
            parameter=size(shape[0] * shape[1], dtype) + own,
            gradient=own,
            optimizer=2 * own,
            basis=size(k, position_dtype(shape[0] * shape[1])),
        )

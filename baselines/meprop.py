"""MeProp in its three meanings: back-propagation that keeps only the largest elements.

Sun et al., "meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced Overfitting", ICML 2017,
arXiv 1706.06197, keeps the top k of `dL/dY` before the two products of the backward pass, for each example by itself
(`meprop-example`) or the same k outputs for the whole minibatch (`meprop-unified`). The SparseGrad paper calls MeProp
what keeps the largest elements of `dL/dW` (`meprop-weight`). The bias gradient is the ordinary one in all three.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baselines.linear import LinearFunction
from baselines.method import EntryMethod, Knob, LayerBytes, Method, coo_bytes, size
from sparsegrad.adapted import AdaptedLinear, adapted_layers, is_transposed, replace_layers, source_weight
from sparsegrad.autocast import like_linear
from sparsegrad.linear import PRODUCTS, topk_gradient
from sparsegrad.products import LiveRows


def keep_example(dy: Tensor, k: int) -> Tensor:
    """`dL/dY` (T, D_out) with all but the k elements of largest magnitude of each row set to zero; a new tensor."""
    index = dy.abs().topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(dy).scatter_(1, index, dy.gather(1, index))


def keep_unified(dy: Tensor, k: int) -> Tensor:
    """Indices (k,), ascending, of the k outputs whose magnitudes in `dL/dY` (T, D_out) sum to the most."""
    return torch.linalg.vector_norm(dy, 1, dim=0).topk(k, sorted=False).indices.sort().values


@like_linear
class ExampleFunction(LinearFunction):
    """Both products of backward take `dL/dY` with k elements per row. dL/dW is dense."""

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX, dL/dW, dL/db."""
        x, weight = ctx.saved_tensors
        live = LiveRows(dy)
        x, dy = live.of(x), live.of(dy)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        kept = keep_example(dy, ctx.k)
        dx = live.back(kept @ weight) if need_x else None
        dweight = kept.T @ x if need_weight else None
        return dx, dweight, dy.sum(0) if need_bias else None, None


@like_linear
class UnifiedFunction(LinearFunction):
    """Both products of backward take the same k outputs of `dL/dY`. dL/dW is k whole rows, as a COO tensor."""

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX, dL/dW (k rows), dL/db."""
        x, weight = ctx.saved_tensors
        live = LiveRows(dy)
        x, dy = live.of(x), live.of(dy)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        outputs = keep_unified(dy, ctx.k)
        kept = dy[:, outputs]
        dx = live.back(kept @ weight[outputs]) if need_x else None
        dweight = None
        if need_weight:
            dweight = torch.sparse_coo_tensor(
                outputs.unsqueeze(0), kept.T @ x, weight.shape, is_coalesced=True, check_invariants=False
            )
        return dx, dweight, dy.sum(0) if need_bias else None, None


@like_linear
class WeightFunction(LinearFunction):
    """dL/dX is exact, dL/dW keeps its k largest entries, as a COO tensor."""

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX, dL/dW (k entries), dL/db."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        # The products that SparseGrad has: stripes of zeros are skipped here too.
        product = PRODUCTS["sparse-by-dense"]
        dweight = topk_gradient(dy, x, ctx.k, product) if need_weight else None
        dx = product.input_gradient(dy, weight) if need_x else None
        return dx, dweight, dy.sum(0) if need_bias else None, None


FUNCTIONS = {"example": ExampleFunction, "unified": UnifiedFunction, "weight": WeightFunction}


class MePropLinear(AdaptedLinear):
    """A linear layer that back-propagates only its largest elements: (..., D_in) -> (..., D_out).

    Args:
        linear: nn.Linear or Conv1D; the weight's storage is shared.
        keep: `example`, `unified` or `weight`.
        k: outputs kept per example, outputs kept per minibatch, or entries of the weight gradient kept.
    """

    def __init__(self, linear: nn.Module, keep: str, k: int):
        weight = source_weight(linear)
        super().__init__(weight.shape[1], weight.shape[0], is_transposed(linear))
        self.keep, self.k = keep, k
        # SparseAdam needs a weight that it can see as rows; only a Conv1D's is copied by this.
        self.weight = nn.Parameter(weight.contiguous())
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        y = FUNCTIONS[self.keep].apply(x.reshape(-1, self.in_features), self.weight, self.bias, self.k)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The weight itself."""
        return self.weight.detach()

    def extra_repr(self) -> str:
        """Shape, bias and what is kept."""
        return f"{super().extra_repr()}, keep={self.keep!r}, k={self.k}"


class _MeProp(Method):
    keep: str

    def layer_k(self, shape) -> int:
        """k of a layer of (D_out, D_in)."""
        return self.budget

    def prepare(self, model, batches):
        """Replace the target layers and set what trains."""
        self.check_model(model)
        replace_layers(
            model,
            self.target_names(),
            lambda layer: MePropLinear(layer, self.keep, self.layer_k(source_weight(layer).shape)),
        )
        self.freeze(model, [layer.weight for _, layer in adapted_layers(model)], [])


class _MePropOutputs(_MeProp):
    def layer_params(self, shape):
        """k D_in: the weight entries behind k outputs."""
        return self.budget * shape[1]

    @classmethod
    def largest_budget(cls, shapes):
        """The smallest D_out."""
        return min(shape[0] for shape in shapes)


class MePropExample(_MePropOutputs):
    """Top k of dL/dY for each example (each token); the union over a minibatch is dense, and so are AdamW's moments.

    `budget_params` counts the k D_in entries that ONE example writes; what the minibatch writes is `updated_params`.
    """

    name = "meprop-example"
    knob = Knob("k outputs per example", default=14)
    keep = "example"

    def formula(self, shape, tokens, dtype):
        """As full fine-tuning: the weight gradient of a minibatch is dense."""
        weight = size(shape[0] * shape[1], dtype)
        return LayerBytes(parameter=weight, gradient=weight, optimizer=2 * weight)


class MePropUnified(_MePropOutputs):
    """The same top k outputs of dL/dY for the whole minibatch; k rows of the weight are written per step."""

    name = "meprop-unified"
    accumulates = False
    knob = Knob("k outputs per minibatch", default=14)
    keep = "unified"

    def sparse_parameters(self, model):
        """The target weights."""
        return (layer.weight for _, layer in adapted_layers(model))

    def formula(self, shape, tokens, dtype):
        """W, k rows of gradient with k int64 indices, and SparseAdam's two dense moments."""
        weight = size(shape[0] * shape[1], dtype)
        rows = size(self.budget * shape[1], dtype) + size(self.budget, torch.int64)
        return LayerBytes(parameter=weight, gradient=rows, optimizer=2 * weight)


class MePropWeight(EntryMethod, _MeProp):
    """The largest entries of dL/dW, in the original basis: SparseGrad without its transition matrices."""

    name = "meprop-weight"
    accumulates = False
    keep = "weight"

    def layer_k(self, shape):
        """The kept entries of a layer of (D_out, D_in)."""
        return self.entries(shape)

    def sparse_parameters(self, model):
        """The target weights."""
        return (layer.weight for _, layer in adapted_layers(model))

    def formula(self, shape, tokens, dtype):
        """W, a COO gradient of k values with 2 k int64 indices, and SparseAdam's two dense moments."""
        weight = size(shape[0] * shape[1], dtype)
        return LayerBytes(parameter=weight, gradient=coo_bytes(self.entries(shape), dtype), optimizer=2 * weight)

"""SparseGradLinear and its autograd function: the signal propagation of the paper's Table 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsegrad.adapted import AdaptedLinear, is_linear, is_transposed, source_weight, weight_shape
from sparsegrad.autocast import cast_to, like_linear
from sparsegrad.basis import TransitionMatrices
from sparsegrad.errors import SparseGradError
from sparsegrad.products import (
    BLOCK_FRACTION,
    LiveRows,
    RowBlock,
    dense_product,
    sparse_by_dense,
    transposed_dense_product,
    transposed_sparse_by_dense,
)
from sparsegrad.support import resolve_nnz, topk_coo, topk_coo_of_product


class Product(NamedTuple):
    """How the two products of the backward pass are made."""

    input_gradient: Callable[[Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor], RowBlock]
    skips_zeros: bool


PRODUCTS = {
    "sparse-by-dense": Product(sparse_by_dense, transposed_sparse_by_dense, True),
    "dense": Product(dense_product, transposed_dense_product, False),
}


@like_linear
class SparseGradFunction(torch.autograd.Function):
    """`Y = X U^T W~^T V + b`; its weight gradient is the top-k of `(dL/dY V^T)^T (X U^T)` as a COO tensor.

    U or V may be None: the identity.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, U, V, nnz, product, blocks):
        """x (T, D_in), weight W~ (D_out, D_in), U (D_in, D_in), V (D_out, D_out) -> (T, D_out)."""
        x_basis = x if U is None else x @ U.to(x.dtype).T
        ctx.save_for_backward(x_basis, weight, U, V)
        ctx.nnz, ctx.product, ctx.blocks = nnz, product, blocks
        left, right = (x_basis, weight.T) if V is None else (x_basis @ weight.T, V.to(x.dtype))
        return left @ right if bias is None else torch.addmm(bias, left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), dL/dW~ (COO), dL/db (D_out,)."""
        x_basis, weight, U, V = ctx.saved_tensors
        # No copies, except under autocast.
        U, V = cast_to(U, dy.dtype), cast_to(V, dy.dtype)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        live = LiveRows(dy) if ctx.product.skips_zeros else None
        if live is not None:
            dy, x_basis = live.of(dy), live.of(x_basis)
        if need_bias:
            dbias = dy.sum(0)
        if ctx.blocks > 1:
            if need_weight:
                dy_basis = dy if V is None else dy @ V.T
                dweight = topk_coo_of_product(dy_basis, x_basis, ctx.nnz, ctx.blocks)
                # Not kept for dL/dX, which has the size of the larger side: the two do not live together.
                del dy_basis
            if need_x:
                dx = _input_gradient_in_blocks(dy, weight, U, V, ctx.blocks)
        elif need_x or need_weight:
            dy_basis = dy if V is None else dy @ V.T
            # The weight first: its dense gradient, the largest temporary here, is gone before dL/dX exists.
            if need_weight:
                dweight = topk_gradient(dy_basis, x_basis, ctx.nnz, ctx.product)
            if need_x:
                dx_basis = ctx.product.input_gradient(dy_basis, weight)
                del dy_basis
                dx = dx_basis if U is None else ctx.product.input_gradient(dx_basis, U)
        if dx is not None and live is not None:
            dx = live.back(dx)
        return dx, dweight, dbias, None, None, None, None, None


def _input_gradient_in_blocks(dy: Tensor, weight: Tensor, U: Tensor | None, V: Tensor | None, blocks: int) -> Tensor:
    """`dL/dY V^T W~ U` (T, D_in) in blocks of tokens: what is rotated of the rest exists for one block alone."""
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    tokens = max(1, -(-dy.shape[0] // blocks))
    for part, out in zip(dy.split(tokens), dx.split(tokens), strict=True):
        part = part if V is None else part @ V.T
        left, right = (part, weight) if U is None else (part @ weight, U)
        torch.mm(left, right, out=out)
    return dx


def topk_gradient(dy: Tensor, x: Tensor, nnz: int, product: Product) -> Tensor:
    """The `nnz` largest entries of `dy.T @ x` as a coalesced COO tensor, for `dy` (T, D_out) and `x` (T, D_in)."""
    block = product.weight_gradient(dy, x)
    if block.block.numel() < nnz:
        # Fewer entries than are to be kept can be non-zero: take the rest from the zeros, as the dense twin does.
        block = transposed_dense_product(dy, x)
    return topk_coo(block, nnz, (dy.shape[1], x.shape[1]))


class SparseGradLinear(AdaptedLinear):
    """A linear layer whose weight lives, and is trained sparsely, in the basis of its gradients.

    With `W~ = V W U^T` it computes `Y = X U^T W~^T V + b`, the values of `Y = X W^T + b` as long as U and V are
    orthogonal. In backward, `dL/dW~ = (dL/dY V^T)^T (X U^T)` keeps its `nnz` entries of largest magnitude, and
    `weight.grad` is a COO tensor of them, sorted and distinct (autograd drops the flag that says so, on its way to
    `.grad`); `bias.grad` is the ordinary `sum_t dL/dY`.
    Source: SparseGrad (EMNLP 2024), Table 2, equations 1 and 2.

    Args:
        weight: W~ (D_out, D_in).
        bias: (D_out,) or None.
        basis: U (D_in, D_in) and V (D_out, D_out), shared by the layers of a kind; either may be None, the identity.
        nnz: entries kept per step.
        product: `sparse-by-dense` skips the zero rows of `dL/dY` and the zero stripes of `dL/dY~`; `dense` is its twin
            for comparison.
        blocks: in how many blocks of rows `dL/dW~` is made and searched, and of tokens `dL/dX`; 1: whole, as published.
            The entries kept are the same but for rounding and ties. In blocks, `sparse-by-dense` skips the zero rows
            of `dL/dY` and no columns.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        basis: TransitionMatrices,
        nnz: int,
        product: str = "sparse-by-dense",
        transposed: bool = False,
        blocks: int = 1,
    ):
        super().__init__(weight.shape[1], weight.shape[0], transposed)
        if product not in PRODUCTS:
            raise SparseGradError(f"product must be one of {', '.join(PRODUCTS)}, got {product!r}")
        check_blocks(blocks)
        basis.check_fits(self.out_features, self.in_features, weight)
        basis.check_complete()
        self.nnz = resolve_nnz(tuple(weight.shape), nnz=nnz)
        self.product = product
        self.blocks = blocks
        self.basis = basis
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        U: Tensor | None,
        V: Tensor | None,
        *,
        nnz: int | None = None,
        density: float | None = None,
        product: str = "sparse-by-dense",
        blocks: int = 1,
    ) -> SparseGradLinear:
        """The layer that computes what `linear` (nn.Linear or Conv1D) does, in the basis of U and V.

        Give `nnz` (entries kept per step) or `density` (their share, in (0, 1]). The bias parameter is shared with
        `linear`, the weight is not. Raises `SparseGradError` for shapes or budgets that do not fit.
        """
        return cls.in_basis(linear, TransitionMatrices(U, V), nnz=nnz, density=density, product=product, blocks=blocks)

    @classmethod
    @torch.no_grad()
    def in_basis(
        cls,
        linear: nn.Module,
        basis: TransitionMatrices,
        *,
        nnz: int | None = None,
        density: float | None = None,
        product: str = "sparse-by-dense",
        blocks: int = 1,
    ) -> SparseGradLinear:
        """`from_linear` with a basis that other layers share."""
        if not is_linear(linear):
            raise SparseGradError(f"only a plain linear layer can be converted, got a {type(linear).__name__}")
        basis.check_fits(*weight_shape(linear), linear.weight)
        basis.check_complete()
        nnz = resolve_nnz(weight_shape(linear), nnz=nnz, density=density)
        rotated = into_basis(source_weight(linear), basis)
        return cls(rotated, linear.bias, basis, nnz, product, is_transposed(linear), blocks)

    def facts(self) -> dict[str, object]:
        """What rebuilds the layer, beside its tensors; JSON."""
        return {"nnz": self.nnz, "product": self.product, "blocks": self.blocks}

    @classmethod
    def state_shapes(cls, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes that the entries of a state must have for a weight of (D_out, D_in)."""
        square = {"basis.U": (shape[1], shape[1]), "basis.V": (shape[0], shape[0])}
        return {"weight": shape, **{name: size for name, size in square.items() if name in stored}}

    @classmethod
    def restored(
        cls, linear: nn.Module, basis: TransitionMatrices, facts: Mapping[str, object], stored: Mapping[str, Tensor]
    ) -> SparseGradLinear:
        """The layer with `facts` in place of `linear`, its weight from what is stored, in the dtype of `linear`'s."""
        weight = stored["weight"].to(linear.weight, copy=True)
        options = facts["nnz"], facts["product"], is_transposed(linear), facts["blocks"]
        return cls(weight, linear.bias, basis, *options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        rows = x.reshape(-1, self.in_features)
        y = SparseGradFunction.apply(
            rows, self.weight, self.bias, self.basis.U, self.basis.V, self.nnz, PRODUCTS[self.product], self.blocks
        )
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W = V^T W~ U` (D_out, D_in)."""
        return out_of_basis(self.weight, self.basis)

    def extra_repr(self) -> str:
        """Shape, bias and budget."""
        return f"{super().extra_repr()}, nnz={self.nnz}, product={self.product!r}, blocks={self.blocks}"


def check_blocks(blocks: int) -> None:
    """Raise `SparseGradError` for what is no number of blocks."""
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise SparseGradError(f"blocks must be an integer of at least 1, got {blocks!r}")


def into_basis(weight: Tensor, basis: TransitionMatrices) -> Tensor:
    """`V W U^T` (k_out, k_in) of W (D_out, D_in), rounded once; a copy."""
    return _rotate(weight, basis.V, None if basis.U is None else basis.U.T)


def out_of_basis(weight: Tensor, basis: TransitionMatrices) -> Tensor:
    """`V^T W~ U` (D_out, D_in) of W~ (k_out, k_in), rounded once; a copy."""
    return _rotate(weight, None if basis.V is None else basis.V.T, basis.U)


def _rotate(weight: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    # In float64: a float32 model keeps its outputs to 1e-6.
    if left is None and right is None:
        return weight.clone()
    product = weight
    if left is not None:
        dtype = weight.dtype if right is None else torch.float64
        product = weight.new_empty(len(left), weight.shape[1], dtype=dtype)
        _multiply(weight.T, left.T, product.T)
    if right is None:
        return product
    return _multiply(product, right, weight.new_empty(len(product), right.shape[1]))


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a @ b` in float64, rounded once; of either, an eighth exists in float64 at a time."""
    for columns, beside in zip(_eighths(b, 1), _eighths(out, 1), strict=True):
        columns = columns.double()
        for rows, target in zip(_eighths(a, 0), _eighths(beside, 0), strict=True):
            target.copy_(rows.double() @ columns)
    return out


def _eighths(matrix: Tensor, dim: int) -> Sequence[Tensor]:
    return matrix.split(-(-matrix.shape[dim] // BLOCK_FRACTION), dim)

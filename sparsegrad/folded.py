"""SparseGrad folded: the published method's steps for a weight that stays where it is.

As published, a layer is three linear layers in a row, `U`, `W~` and `V`. Here it is the one it was, and the basis turns
what moves alone: the weight gradient into it, the optimizer's step of k entries out of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsegrad.adapted import (
    AdaptedLinear,
    check_unconverted,
    is_linear,
    is_transposed,
    replace_layers,
    source_weight,
    weight_shape,
)
from sparsegrad.autocast import cast_to, like_linear
from sparsegrad.basis import TransitionMatrices, check_bases
from sparsegrad.errors import SparseGradError
from sparsegrad.products import LiveRows
from sparsegrad.support import resolve_nnz
from sparsegrad.values import passes

# The least magnitude that is kept is guessed from every 61st entry. In a matrix of 61 columns, or twice as many, those
# would all lie in one; then it is every 59th.
STRIDES = (61, 59)
# Standard deviations, of a count in a random sample, by which a guess is made on the safe side.
MARGIN = 4


@like_linear
class FoldedFunction(torch.autograd.Function):
    """`Y = X W^T + b`; its weight gradient is the top-k of `V G U^T`, `G = (dL/dY)^T X`, as a COO tensor.

    U or V may be None: the identity. Tokens whose dL/dY is zero take no part in backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, U, V, nnz):
        """x (T, D_in), weight W (D_out, D_in), U (D_in, D_in), V (D_out, D_out) -> (T, D_out)."""
        ctx.save_for_backward(x, weight, U, V)
        ctx.nnz = nnz
        return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), the gradient of W in the basis (COO), dL/db (D_out,)."""
        x, weight, U, V = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        live = LiveRows(dy)
        dy = live.of(dy)
        # The weight first: its dense gradients are gone before dL/dX exists.
        if need_weight:
            # No copies of the matrices, except under autocast.
            U, V = cast_to(U, dy.dtype), cast_to(V, dy.dtype)
            dweight = _largest_as_coo(gradient_in_basis(dy, live.of(x), U, V), ctx.nnz)
            del U, V
        if need_bias:
            dbias = dy.sum(0)
        if need_x:
            dx = live.back(dy @ weight)
        return dx, dweight, dbias, None, None, None


def gradient_in_basis(dy: Tensor, x: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """`V dL/dY^T X U^T` (D_out, D_in) of dL/dY (T, D_out) and X (T, D_in); what is rotated on a side is the smaller.

    Either T tokens are, before they are multiplied, or the product's D_in columns or D_out rows after.
    """
    tokens, d_out, d_in = len(dy), dy.shape[1], x.shape[1]
    if V is not None and tokens < d_in:
        dy, V = dy @ V.T, None
    if U is not None and tokens < d_out:
        x, U = x @ U.T, None
    gradient = dy.T @ x
    del dy, x
    if V is not None:
        gradient = V @ gradient
    return gradient if U is None else gradient @ U.T


def _largest_as_coo(matrix: Tensor, count: int) -> Tensor:
    flat = largest(matrix, count)
    values = torch.take(matrix, flat)
    row = flat.div(matrix.shape[1], rounding_mode="floor")
    indices = torch.stack((row, flat.remainder_(matrix.shape[1])))
    return torch.sparse_coo_tensor(indices, values, matrix.shape, is_coalesced=True, check_invariants=False)


def largest(matrix: Tensor, count: int) -> Tensor:
    """The rising flat positions of the `count` entries of largest magnitude of a contiguous matrix, (count,) of int64.

    Exact, of NaN too, which counts as the largest; of several entries with the least magnitude that is kept, it is not
    said which are. `torch.topk` over all entries takes several times as long, so it chooses among candidates: entries
    not below a threshold that a sample gives, where these are enough and not too many (else among all). The sizes of
    all tensors here depend on those of the matrix alone.
    """
    entries = matrix.view(-1)
    stride = STRIDES[matrix.shape[1] % STRIDES[0] == 0]
    in_sample = _at_least(count / stride)
    room = stride * _at_least(in_sample)
    if 2 * room < entries.numel():
        least = entries[::stride].abs().topk(in_sample, sorted=False).values.min()
        # Asked for what is below, so that NaN stays.
        outside = entries < least
        outside.logical_and_(entries > -least).logical_not_()
        found = torch.nonzero_static(outside, size=room).squeeze(1)
        del outside
        # Places that no candidate fills come last, as -1: at least `count` are filled, and at least one is not.
        if passes((found[count - 1] >= 0) & (found[-1] < 0)):
            magnitudes = torch.take(entries, found.clamp(min=0)).abs_().masked_fill_(found < 0, -1)
            kept = torch.zeros_like(found, dtype=torch.bool)
            kept.index_fill_(0, magnitudes.topk(count, sorted=False).indices, True)
            del magnitudes
            return found[torch.nonzero_static(kept, size=count).squeeze(1)]
        del found
    return entries.abs().topk(count, sorted=False).indices.sort().values


def _at_least(expected: float) -> int:
    return math.ceil(expected + MARGIN * math.sqrt(expected) + MARGIN)


def add_from_basis(weight: Tensor, indices: Tensor, values: Tensor, basis: TransitionMatrices) -> None:
    """Add `V^T D U` to W (D_out, D_in) in place, where D holds `values` (k,) at distinct `indices` (2, k).

    D is multiplied by the matrix of the larger side first: as a sparse matrix it costs k times that size, and what is
    dense then meets the smaller side.
    """
    U, V = basis.U, basis.V
    d_out, d_in = weight.shape
    if U is None and V is None:
        weight.view(-1).index_add_(0, indices[0] * d_in + indices[1], values)
    elif V is None or (U is not None and d_in > d_out):
        D = torch.sparse_coo_tensor(indices, values, (d_out, d_in), check_invariants=False)
        if V is None:
            _add_product(weight, D, U)
        else:
            weight.addmm_(V.T, _add_product(weight.new_zeros(d_out, d_in), D, U))
    else:
        D = torch.sparse_coo_tensor(indices.flip(0), values, (d_in, d_out), check_invariants=False)
        turned = _add_product(weight.new_zeros(d_in, d_out), D, V)
        if U is None:
            weight.add_(turned.T)
        else:
            weight.addmm_(turned.T, U)


def _add_product(total: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
    """Add `sparse @ dense` to the total in place, and return it.

    torch multiplies no sparse matrix of half precision on CUDA. A dense one takes its place there, which is what the
    product of a sparse one holds besides in any precision: a second matrix of the total's size.
    """
    if total.is_cuda and total.dtype in (torch.float16, torch.bfloat16):
        row, col = sparse._indices()
        filled = torch.zeros(sparse.shape, dtype=total.dtype, device=total.device)
        filled.view(-1)[row * sparse.shape[1] + col] = sparse._values()
        return total.addmm_(filled, dense)
    return total.addmm_(sparse, dense)


class FoldedLinear(AdaptedLinear):
    """A linear layer with SparseGrad's training and its own forward pass: `Y = X W^T + b`, (..., D_in) -> (..., D_out).

    `weight` is W itself, but `weight.grad` is NOT in its coordinates: it is a COO tensor of the `nnz` entries of
    largest magnitude of `V G U^T`, the gradient in the basis, as `SparseGradLinear` has it. `sparsegrad.SparseAdam`
    turns its step of k entries back, `W += V^T D U`; it finds the basis as `weight.gradient_basis`. NO OTHER OPTIMIZER
    DOES: torch.optim.SparseAdam would add the step where it does not belong, and not complain. Norms of the gradient,
    and clipping by them, mean the same in both coordinates.

    In exact arithmetic outputs, supports and merged weights are those of `SparseGradLinear` at every step. In floating
    point W is rounded when a step is added. A step changes k entries of W~ by about the step size each, but ALL entries
    of W, by about the step size times the root of the density each: in float32 that is far above the rounding of W, in
    bfloat16 most of it is not, and is lost.

    It takes 0.4 times as long as the published form at T = 2048 tokens that reach the loss, 0.6 to 0.8 at 512, and
    about as long at 128 (weights of 384x1536 and 768x3072 and their transposes, one CPU core, forward, backward and
    optimizer): turning W's step costs the same at every T, and below that it is the slower one.

    Args:
        linear: nn.Linear or Conv1D. Its bias and, as far as that is stored as (D_out, D_in), its weight are shared.
        basis: U (D_in, D_in) and V (D_out, D_out), shared by the layers of a kind; either may be None, the identity.
        nnz: entries kept per step; or
        density: their share of the weight, in (0, 1].

    Raises `SparseGradError` for a layer, matrices or a budget that do not fit.
    """

    def __init__(
        self,
        linear: nn.Module,
        basis: TransitionMatrices,
        *,
        nnz: int | None = None,
        density: float | None = None,
    ):
        if not is_linear(linear):
            raise SparseGradError(f"only a plain linear layer can be converted, got a {type(linear).__name__}")
        d_out, d_in = weight_shape(linear)
        basis.check_fits(d_out, d_in, linear.weight)
        basis.check_complete()
        nnz = resolve_nnz((d_out, d_in), nnz=nnz, density=density)
        super().__init__(d_in, d_out, is_transposed(linear))
        self.nnz = nnz
        self.basis = basis
        self.weight = nn.Parameter(source_weight(linear).contiguous())
        self.register_parameter("bias", linear.bias)

    def facts(self) -> dict[str, object]:
        """What rebuilds the layer, beside its tensors; JSON."""
        return {"nnz": self.nnz}

    @classmethod
    def state_shapes(cls, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes that the entries of a state must have for a weight of (D_out, D_in)."""
        square = {"basis.U": (shape[1], shape[1]), "basis.V": (shape[0], shape[0])}
        return {"weight": shape, **{name: size for name, size in square.items() if name in stored}}

    @classmethod
    def restored(
        cls, linear: nn.Module, basis: TransitionMatrices, facts: Mapping[str, object], stored: Mapping[str, Tensor]
    ) -> FoldedLinear:
        """The layer with `facts` in place of `linear`; its tensors are still to be loaded."""
        return cls(linear, basis, nnz=facts["nnz"])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        # Here and not at the start: a copy of the model, or one that is loaded, may have got itself another parameter.
        self.weight.gradient_basis = self.basis
        rows = x.reshape(-1, self.in_features)
        y = FoldedFunction.apply(rows, self.weight, self.bias, self.basis.U, self.basis.V, self.nnz)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The weight itself."""
        return self.weight.detach()

    def extra_repr(self) -> str:
        """Shape, bias and budget."""
        return f"{super().extra_repr()}, nnz={self.nnz}"


def convert_folded(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    bases: Mapping[str, TransitionMatrices],
    *,
    nnz: int | None = None,
    density: float | None = None,
) -> nn.Module:
    """Replace the named linear layers by `FoldedLinear`, in place; returns the model.

    Args:
        model: the model, unconverted.
        layers: kind -> layer names, from `find_layers`.
        bases: kind -> transition matrices, from `calibrate`.
        nnz: entries kept per layer and step; or
        density: their share of each layer's weight, in (0, 1].

    Raises:
        SparseGradError: before anything is changed, for whatever does not fit.
    """
    check_unconverted(model)
    shapes = check_bases(model, layers, bases)
    for kind, shape in shapes.items():
        bases[kind].check_complete()
        resolve_nnz(shape, nnz=nnz, density=density)
    for kind, names in layers.items():
        basis = bases[kind]
        replace_layers(model, names, lambda layer, basis=basis: FoldedLinear(layer, basis, nnz=nnz, density=density))
    return model

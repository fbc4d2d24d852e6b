"""The leading core: only the block of a weight's gradient along its first k_out x k_in directions is trained.

Nothing of the input's width is kept for backward: the core's gradient needs `X U_k^T` (T, k_in) alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsegrad.adapted import AdaptedLinear, check_unconverted, is_linear, is_transposed, replace_layers, source_weight
from sparsegrad.autocast import cast_to, like_linear
from sparsegrad.basis import Ranks, TransitionMatrices, check_bases
from sparsegrad.errors import SparseGradError
from sparsegrad.linear import out_of_basis
from sparsegrad.products import LiveRows
from sparsegrad.support import resolve_nnz

# How much more than the cheapest k_out a core may have. At a third more the bases, and the products with them, cost 4 %
# more than they must, while a quarter less is kept for backward.
MOST_K_OUT = 4 / 3


def core_shape(entries: int, shape: tuple[int, int]) -> Ranks:
    """The core (k_out, k_in) of a weight (D_out, D_in) that holds as many of `entries` as a cheap one can.

    A core costs `k_out D_out + k_in D_in`: the entries of its two bases, and twice that many multiplications for each
    token of a step. At a fixed number of entries this is least at `k_out / k_in = D_in / D_out`; backward keeps k_in
    numbers of each token, so cores are taken from there up to `MOST_K_OUT` times as many rows. Among those the one with
    the most entries is chosen, then the one with the smallest k_in. The choice rests on the shape alone, and more
    `entries` never give a smaller core.

    Raises:
        SparseGradError: `entries` is outside 1 .. D_out * D_in.
    """
    d_out, d_in = shape
    for count in range(resolve_nnz(shape, nnz=entries), 0, -1):
        cheapest = min(max(math.sqrt(count * d_in / d_out), count / d_in, 1), d_out, count)
        for k_out in range(min(math.ceil(MOST_K_OUT * cheapest), d_out, count), math.floor(cheapest) - 1, -1):
            if count % k_out == 0 and count // k_out <= d_in:
                return Ranks(k_out, count // k_out)
    raise AssertionError("a core of one entry fits every weight")


@like_linear
class CoreFunction(torch.autograd.Function):
    """`Y = X W^T + b + ((X U^T) C^T) V`, of which only C and b train; X is not kept for backward.

    V may be None: the identity.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, core, U, V):
        """x (T, D_in), weight (D_out, D_in), core (k_out, k_in), U (k_in, D_in), V (k_out, D_out) -> (T, D_out)."""
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        # Conversions copy nothing, except of the core, and except under autocast.
        low = x @ U.to(x.dtype).T
        left, right = (low, core.T) if V is None else (low @ core.to(low.dtype).T, V)
        y.addmm_(left, right.to(y.dtype))
        ctx.save_for_backward(low, weight, core, U, V)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), dL/dC (k_out, k_in), dL/db (D_out,)."""
        low, weight, core, U, V = ctx.saved_tensors
        U, V = cast_to(U, dy.dtype), cast_to(V, dy.dtype)
        need_x, _, need_bias, need_core, _, _ = ctx.needs_input_grad
        dx = dbias = dcore = None
        live = LiveRows(dy)
        dy = live.of(dy)
        if need_bias:
            dbias = dy.sum(0)
        if need_x or need_core:
            dmiddle = dy if V is None else dy @ V.T
        if need_core:
            dcore = (dmiddle.T @ live.of(low)).to(core.dtype)
        if need_x:
            dlow = dmiddle @ core.to(weight.dtype)
            del dmiddle, low
            dx = dy @ weight
            del dy
            dx.addmm_(dlow, U)
            del dlow
            dx = live.back(dx)
        return dx, None, dbias, dcore, None, None


class CoreLinear(AdaptedLinear):
    """A frozen linear layer plus a trained core in its leading directions: (..., D_in) -> (..., D_out).

    `Y = X W^T + b + ((X U^T) C^T) V`: the layer's weight is `W + V^T C U`, and `dL/dC` is the leading block of the
    gradient in the basis, `(dL/dY V^T)^T (X U^T)`. C starts at zero, so that nothing changes at first. `weight` is the
    source's own storage and never trains.

    Args:
        linear: nn.Linear or Conv1D.
        basis: U (k_in, D_in) and V (k_out, D_out), shared by the layers of a kind. V may be None, the identity: the
            core has all D_out rows, and there is one basis less to hold and to multiply with.
        dtype: dtype of C; None for the weight's. Products are made in the input's.

    Raises:
        SparseGradError: the layer is no plain linear one, or the basis has no U or does not fit it.
    """

    def __init__(self, linear: nn.Module, basis: TransitionMatrices, dtype: torch.dtype | None = None):
        if not is_linear(linear):
            raise SparseGradError(f"only a plain linear layer can be converted, got a {type(linear).__name__}")
        weight = source_weight(linear)
        basis.check_fits(*weight.shape, weight)
        check_input_basis(basis)
        super().__init__(weight.shape[1], weight.shape[0], is_transposed(linear))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.basis = basis
        size = (self.out_features if basis.V is None else len(basis.V), len(basis.U))
        self.core = nn.Parameter(torch.zeros(size, dtype=dtype or weight.dtype, device=weight.device))

    def facts(self) -> dict[str, object]:
        """What rebuilds the layer, beside its tensors: nothing."""
        return {}

    @classmethod
    def state_shapes(cls, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes that the entries of a state must have for a weight of (D_out, D_in)."""
        d_out, d_in = shape
        k_in = len(stored["basis.U"]) if "basis.U" in stored else d_in
        k_out = len(stored["basis.V"]) if "basis.V" in stored else d_out
        V = {"basis.V": (k_out, d_out)} if "basis.V" in stored else {}
        return {"weight": shape, "core": (k_out, k_in), "basis.U": (k_in, d_in), **V}

    @classmethod
    def restored(
        cls, linear: nn.Module, basis: TransitionMatrices, facts: Mapping[str, object], stored: Mapping[str, Tensor]
    ) -> CoreLinear:
        """The layer in place of `linear`; its tensors are still to be loaded.

        A core that was stored in a wider dtype than the weight keeps it; others take that of `linear`'s weight.
        """
        core = stored["core"].dtype
        return cls(linear, basis, None if core == stored["weight"].dtype else core)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        rows = x.reshape(-1, self.in_features)
        y = CoreFunction.apply(rows, self.weight, self.bias, self.core, self.basis.U, self.basis.V)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W + V^T C U` (D_out, D_in), rounded once."""
        return (self.weight + out_of_basis(self.core.double(), self.basis)).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shape, bias and core."""
        return f"{super().extra_repr()}, core={self.core.shape[0]}x{self.core.shape[1]}"


def check_input_basis(basis: TransitionMatrices) -> None:
    """Raise `SparseGradError` where U is None: X itself would have to be kept for backward."""
    if basis.U is None:
        raise SparseGradError("a core needs U, and it is None; calibrate with a k_in of 1 or more")


def convert_core(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    bases: Mapping[str, TransitionMatrices],
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replace the named linear layers by `CoreLinear`, in place; returns the model.

    >>> ranks = {kind: core_shape(26_880, shape) for kind, shape in shapes.items()}
    >>> convert_core(model, layers, calibrate(model, layers, batches, ranks=ranks))

    Args:
        model: the model, unconverted.
        layers: kind -> layer names, from `find_layers`.
        bases: kind -> leading directions, from `calibrate` with ranks.
        dtype: dtype of the cores; None for the weights'.

    Raises:
        SparseGradError: before anything is changed, for whatever does not fit.
    """
    check_unconverted(model)
    check_bases(model, layers, bases)
    for kind in layers:
        check_input_basis(bases[kind])
    for kind, names in layers.items():
        replace_layers(model, names, lambda layer, basis=bases[kind]: CoreLinear(layer, basis, dtype))
    return model
